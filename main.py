"""Train an image classifier against an adversary that writes its augmentation policies.

    python main.py                                            # confs/demo.yaml: embedded data, CPU, a minute or two
    python main.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --M 8 --seed 0 --amp
    python main.py --load_conf ... --logdir ./logs --seed 0 --resume      # go on exactly where it stopped
    python main.py --load_conf ... --set policy=random lr=0.05 --name control   # any setting of config.py

A batch of N images becomes N * M copies, each image once per policy, in one forward pass. The network descends the mean
loss; once per interval the M mean losses tell the policies which of them were hard.

Shape suffixes: N distinct images of a batch, M policies, B = N * M copies (image-major: copy m of image n stands at
n * M + m); C, H, W as usual, but for logits_BC, where C counts classes.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentations import apply
from checkpoint import load_newest_checkpoint, save_checkpoint, write_atomically, write_text
from config import (
    DEFAULT_CONF,
    Config,
    add_arguments,
    changed_settings,
    load_config,
    overrides_from,
    plain_values,
    run_directory,
    to_yaml,
)
from dataloader import Data, Normalise, Split, balanced_order, cutout, epoch_batches, load_data, make_copies
from evaluate import score
from models import build_model
from policies import PolicySource, build_policies
from runlog import Progress, RunLog
from utils import (
    CommandLine,
    UserError,
    choose_device,
    environment,
    exit_with_status,
    keyed_generator,
    random_state,
    seed_everything,
    set_random_state,
    warn,
)


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    device = choose_device(args.device)
    check_support(config, device)
    run = run_directory(args, config)
    check_run_directory(run, config, args)

    data = load_data(config, device)
    seed_everything(config.seed, device, config.deterministic)
    model = build_model(config.model, len(data.classes), **config.model_options())
    model = model.to(device, memory_format=torch.channels_last)
    state = TrainingState.start(config, device, model)

    fingerprint, positions = data.fingerprint(), None
    if args.resume and (saved := load_newest_checkpoint(run / "checkpoints", warn)):
        if saved["data"] != fingerprint:
            raise UserError(f"{run}: cannot be resumed, the images in {config.dataroot} are not those it began with")
        positions = saved["positions"]
        state.load_state_dict(saved, run)
    write_run_directory(run, config, device, afresh=args.overwrite)

    steps = len(data.train.labels) // config.batch_size
    log = RunLog(run, positions, step=state.epoch * steps)
    progress = Progress(config.epochs * steps, done=state.epoch * steps)
    try:
        while state.epoch < min(config.epochs, args.stop_epoch or config.epochs):
            started = time.perf_counter()
            metrics, intervals = train_one_epoch(state, data.train, progress)
            trained = time.perf_counter()
            state.epoch += 1
            if state.epoch % config.eval_every == 0 or state.epoch == config.epochs:
                metrics |= score_for_the_log(state, data)
            times = {"train_seconds": trained - started, "other_seconds": time.perf_counter() - trained}
            times["images_per_second"] = steps * config.batch_size * config.M / times["train_seconds"]
            log.epoch(state.epoch, state.epoch * steps, metrics, times, intervals)
            if state.epoch in preview_epochs(config.epochs):
                log.policy_images(*preview(state, data.train), step=state.epoch * steps)
            save_model(run / "model.pt", state, data.classes)
            kept = state.state_dict() | {"positions": log.positions(), "data": fingerprint}
            save_checkpoint(run / "checkpoints", state.epoch, kept)
            progress.say(epoch_line(state, metrics, times))
    except FloatingPointError as error:
        raise UserError(
            f"{run}: {error} in epoch {state.epoch + 1}; the epochs before it are kept\n"
            "start another run with a lower lr, or with grad_clip or warmup_epochs set"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished epochs are kept; go on with: {resume_command()}") from None
    finally:
        progress.close()
        log.close()
    print(closing_words(run, state))


@dataclass
class TrainingState:
    """Everything that changes during training, as one thing to save and restore."""

    config: Config
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    policies: PolicySource
    normalise: Normalise
    epoch: int = 0  # finished epochs
    best: float = 0.0  # best top-1 seen on the split that is scored during training; nothing is chosen by it

    @classmethod
    def start(cls, config: Config, device: torch.device, model: nn.Module) -> "TrainingState":
        optimizer = torch.optim.SGD(
            model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov
        )
        scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
        return cls(config, device, model, optimizer, scaler, build_policies(config), Normalise(config, device))

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "policies": self.policies.state_dict(),
            "random": random_state(self.device),
        }

    def load_state_dict(self, saved: dict[str, Any], run: Path) -> None:
        """Raises UserError when the checkpoint of `run` is not of this network and these settings."""
        try:
            self.epoch, self.best = saved["epoch"], saved["best"]
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            self.policies.load_state_dict(saved["policies"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{run}: its checkpoint does not fit the settings in its config.yaml ({reason})") from None
        set_random_state(saved["random"], self.device)


def train_one_epoch(state: TrainingState, split: Split, progress: Progress) -> tuple[dict[str, float], list[dict]]:
    """Algorithm 1, one epoch. Returns loss and accuracy over all copies, and the records of the intervals it ended.

    Raises FloatingPointError when the loss is no longer finite.
    """
    config, model, optimizer, policies = state.config, state.model, state.optimizer, state.policies
    batches = epoch_batches(len(split.labels), config.batch_size, config.seed, state.epoch)
    interval = config.policy_interval or len(batches)
    loss_and_correct, seen = torch.zeros(2, dtype=torch.float64, device=state.device), 0
    intervals = []
    model.train()
    for step, (images_NCHW, labels_N) in enumerate(split.batches(batches), start=state.epoch * len(batches)):
        if step % interval == 0:
            policies.resample(keyed_generator(config.seed, "policies", step // interval))
        copies_BCHW = augment(state, images_NCHW, "train", step)
        inputs_BCHW = cutout(state.normalise(copies_BCHW), config.cutout, keyed_generator(config.seed, "cutout", step))
        labels_B = labels_N.repeat_interleave(config.M)

        with torch.autocast(state.device.type, getattr(torch, config.amp_dtype), enabled=config.amp):
            logits_BC = model(inputs_BCHW.contiguous(memory_format=torch.channels_last)).float()
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        state.scaler.scale(loss_B.mean()).backward()
        descend(state, learning_rate(config, step, len(batches)))

        policies.observe(loss_B.view(-1, config.M))
        if (step + 1) % interval == 0 or step + 1 == config.epochs * len(batches):
            intervals.append({"interval": step // interval, "step": step + 1, **policies.update()})
        loss_and_correct += torch.stack((loss_B.detach().sum(), (logits_BC.argmax(1) == labels_B).sum()))
        seen += len(labels_B)
        progress.step(f"epoch {state.epoch + 1}/{config.epochs}", loss_and_correct, seen)
    loss, correct = (loss_and_correct / seen).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is no longer finite")
    return {"lr": optimizer.param_groups[0]["lr"], "train_loss": loss, "train_top1": correct}, intervals


def augment(state: TrainingState, images_NCHW: Tensor, purpose: str, step: int) -> Tensor:
    """The M copies of each image after crop, flip and policy, uint8 (N * M, C, H, W), image-major."""
    config = state.config
    crop_draws, plan_draws = (keyed_generator(config.seed, purpose, what, step) for what in ("crop", "plan"))
    copies_BCHW = make_copies(images_NCHW, config.M, config, crop_draws)
    return apply(copies_BCHW, state.policies.plan(len(images_NCHW), plan_draws))


def descend(state: TrainingState, lr: float) -> None:
    """One step of the network's optimizer at the given rate, for gradients scaled by the scaler."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    if state.config.grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.model.parameters(), state.config.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Rate for the given step of the run: linear warm-up, then cosine to zero or drops at the milestones."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def score_for_the_log(state: TrainingState, data: Data) -> dict[str, float]:
    """Loss and accuracy on the held-out part or, without one, on the test set. Nothing is chosen by them."""
    name, split = ("test", data.test) if data.valid is None else ("valid", data.valid)
    scores = score(state.model, split, state.normalise, state.device)
    state.best = max(state.best, scores.top1)
    return {f"{name}_loss": scores.loss, f"{name}_top1": scores.top1, f"{name}_top1_best_seen": state.best}


def preview_epochs(epochs: int) -> set[int]:
    """The first, the last, and about every twentieth part of the run between."""
    return {1, epochs, *range(max(1, epochs // 20), epochs, max(1, epochs // 20))}


@torch.no_grad()
def preview(state: TrainingState, split: Split) -> tuple[Tensor, list[str]]:
    """Up to eight training images under each policy in use, (M, images, C, H, W), and those policies in words."""
    images_NCHW, _ = next(iter(split.batches([balanced_order(split.labels)[:8]])))
    copies_BCHW = augment(state, images_NCHW, "preview", state.epoch)
    return copies_BCHW.unflatten(0, (-1, state.config.M)).transpose(0, 1), state.policies.in_words()


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="main.py", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--M", help="policies in use at a time; every image is seen once per policy")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--resume", action="store_true", help="go on exactly where the run stopped")
    parser.add_argument("--overwrite", action="store_true", help="delete the run of that name and start anew")
    parser.add_argument(
        "--stop_epoch", type=int, metavar="E", help="stop after E epochs; the schedule's horizon is unchanged"
    )
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.stop_epoch is not None and args.stop_epoch < 1:
        parser.error(f"--stop_epoch: {args.stop_epoch} must be at least 1")
    return args


def check_support(config: Config, device: torch.device) -> None:
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise UserError(
            "several processes were launched, but this version trains in one; start it with --nproc_per_node 1"
        )
    if config.amp and config.amp_dtype == "float16" and device.type != "cuda":
        raise UserError(f"amp_dtype: float16 needs CUDA, and this run is on {device}; use amp_dtype: bfloat16")


def check_run_directory(run: Path, config: Config, args: argparse.Namespace) -> None:
    """Refuse to write over a run, or to resume one that was another. Nothing is changed yet."""
    holds_run = (run / "config.yaml").exists()
    if args.resume:
        if not holds_run:
            raise UserError(f"{run}: there is no run to resume; leave out --resume to start one")
        if changes := changed_settings(load_config(run / "config.yaml", {}), config):
            raise UserError(
                f"{run}: cannot be resumed with other settings ({'; '.join(changes)})\n"
                "ask for the settings it has, or start another run with --name"
            )
    elif run.is_file() or (run.is_dir() and any(run.iterdir())):
        if not holds_run:
            raise UserError(f"{run}: exists and is not a run; choose another place with --logdir or --name")
        if not args.overwrite:
            raise UserError(
                f"{run}: holds a run already; go on with --resume, start anew with --overwrite, or use --name"
            )


def write_run_directory(run: Path, config: Config, device: torch.device, *, afresh: bool) -> None:
    """Make the directory, or empty it if `afresh`; write the settings, and where and with what this start computes."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        for old in run.iterdir() if afresh else ():
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    except OSError as error:
        raise UserError(f"{run}: cannot be made or emptied ({error}); choose another place with --logdir") from None
    path = run / "environment.json"
    starts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    starts.append(environment(device))
    first, now = starts[0], starts[-1]
    for name in ("torch", "device", "threads"):
        if first[name] != now[name]:
            warn(f"{run}: began with {name} {first[name]}, goes on with {now[name]}: not bit for bit the same")
    write_text(path, json.dumps(starts, indent=2) + "\n")
    write_text(run / "config.yaml", to_yaml(config))


def save_model(path: Path, state: TrainingState, classes: tuple[str, ...]) -> None:
    """The weights and what evaluate.py needs to use them; tensors and plain values only."""
    content = {
        "model": state.model.state_dict(),
        "classes": list(classes),
        "epoch": state.epoch,
        "config": plain_values(state.config),
    }
    write_atomically(path, lambda new: torch.save(content, new))


def epoch_line(state: TrainingState, metrics: dict[str, float], times: dict[str, float]) -> str:
    words = [
        f"epoch {state.epoch}/{state.config.epochs}",
        f"loss {metrics['train_loss']:.3f}",
        f"accuracy {metrics['train_top1']:.1%}",
    ]
    for name in ("test", "valid"):
        if f"{name}_top1" in metrics:
            words += [f"{name} loss {metrics[f'{name}_loss']:.3f}", f"{name} accuracy {metrics[f'{name}_top1']:.1%}"]
    left = (state.config.epochs - state.epoch) * (times["train_seconds"] + times["other_seconds"])
    return ", ".join([*words, f"{times['images_per_second']:,.0f} images/s", f"{duration(left)} left"])


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def closing_words(run: Path, state: TrainingState) -> str:
    words = [
        "",
        f"The run lies in {run} ({state.epoch} of {state.config.epochs} epochs).",
        f"  score it     python evaluate.py --checkpoint {shlex.quote(str(run / 'model.pt'))}",
        f"  look at it   tensorboard --logdir {shlex.quote(str(run.parent))}",
    ]
    if state.epoch < state.config.epochs:
        words.append(f"  go on        {resume_command()}")
    return "\n".join(words)


def resume_command() -> str:
    """This command, with --resume."""
    words, left_out = [], 0
    for word in sys.argv[1:]:
        if word == "--stop_epoch":
            left_out = 2
        if left_out == 0 and word not in ("--overwrite", "--resume") and not word.startswith("--stop_epoch="):
            words.append(word)
        left_out = max(0, left_out - 1)
    return shlex.join(["python", "main.py", *words, "--resume"])


if __name__ == "__main__":
    exit_with_status(main)
