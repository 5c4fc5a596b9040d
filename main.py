"""Train an image classifier against an adversary that writes its augmentation policies.

    python main.py                                            # confs/demo.yaml: embedded data, CPU, a minute or two
    python main.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --M 8 --seed 0 --amp
    torchrun --nproc_per_node 8 main.py --load_conf ... --amp             # a process per GPU
    python main.py --load_conf ... --logdir ./logs --seed 0 --resume      # go on exactly where it stopped
    python main.py --load_conf ... --set policy=random lr=0.05 --name control   # any setting of config.py

A batch of N images becomes N * M copies, each image once per policy, in one forward pass. The network descends the mean
loss; once per interval the M mean losses tell the policies which of them were hard.

With several processes, or with `accumulate`, the N images of a step are dealt into micro-batches of whole images. What
happens to each copy is drawn for the whole batch beforehand, so that it does not depend on who deals with it.

Shape suffixes: N distinct images of a batch, M policies, B = N * M copies (image-major: copy m of image n stands at
n * M + m); C, H, W as usual, but for logits_BC, where C counts classes.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentations import Plan, apply, portion
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
from dataloader import (
    Crops,
    Data,
    Normalise,
    Split,
    balanced_order,
    cutout_mask,
    draw_centres,
    draw_crops,
    epoch_batches,
    load_data,
    make_copies,
)
from download import Downloads
from evaluate import score
from models import build_model
from policies import PolicySource, Tally, build_policies
from processes import World, digest, each_waits_for_the_last, exit_with_status, join
from runlog import Progress, RunLog, SilentLog
from utils import (
    CommandLine,
    UserError,
    choose_kernels,
    duration,
    environment,
    keyed_generator,
    random_state,
    seed_default_generators,
    set_random_state,
    warn,
)


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    with join(args.device) as world:
        train(config, args, world)


def train(config: Config, args: argparse.Namespace, world: World) -> None:
    check_support(config, world)
    run = run_directory(args, config)
    if world.leads:
        check_run_directory(run, config, args)

    with world.one_first(config.fetches_data):
        data = load_data(config, world.device, Downloads(args.data_url, not args.no_download, quiet=not world.leads))
    fingerprint = data.fingerprint()
    world.require_equal("the images", lambda: fingerprint)
    choose_kernels(world.device, config.deterministic, config.tf32)
    seed_default_generators(world.devices, config.seed, "network")
    model = build_model(config.model, len(data.classes), **config.model_options())
    seed_default_generators(world.devices, config.seed, "noise", world.rank)
    state = TrainingState.start(config, world, model.to(world.device, memory_format=torch.channels_last))

    positions = None
    if args.resume:
        saved = world.from_leader(load_newest_checkpoint(run / "checkpoints", warn) if world.leads else None)
        if saved and saved["data"] != fingerprint:
            raise UserError(f"{run}: cannot be resumed, the images in {config.dataroot} are not those it began with")
        if saved:
            positions = saved["positions"]
            state.load_state_dict(saved, run)
    if world.leads:
        write_run_directory(run, config, world.device, afresh=args.overwrite)

    steps = len(data.train.labels) // config.batch_size
    log = RunLog(run, positions, step=state.epoch * steps) if world.leads else SilentLog()
    progress = Progress(config.epochs * steps, done=state.epoch * steps, shown=world.leads)
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
            if world.leads and state.epoch in preview_epochs(config.epochs):
                log.policy_images(*preview(state, data.train), step=state.epoch * steps)
            kept = state.state_dict() | {"positions": log.positions(), "data": fingerprint}
            if world.leads:
                save_model(run / "model.pt", state, data.classes)
                save_checkpoint(run / "checkpoints", state.epoch, kept)
            progress.say(epoch_line(state, metrics, times))
    except FloatingPointError as error:
        raise UserError(
            f"{run}: {error} in epoch {state.epoch + 1}; the epochs before it are kept\n"
            "start another run with a lower lr, or with grad_clip or warmup_epochs set"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"finished epochs are kept; go on with: {resume_command(world)}") from None
    finally:
        progress.close()
        log.close()
    progress.say(closing_words(run, state))


@dataclass
class TrainingState:
    """Everything that changes during training, as one thing to save and restore."""

    config: Config
    world: World
    model: nn.Module
    trained: nn.Module  # the same model, as it is called in training: on all devices of the run
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    policies: PolicySource
    normalise: Normalise
    epoch: int = 0  # finished epochs
    best: float = 0.0  # best top-1 seen on the split that is scored during training; nothing is chosen by it

    @classmethod
    def start(cls, config: Config, world: World, model: nn.Module) -> "TrainingState":
        optimizer = build_optimizer(model, config, fused=world.device.type == "cuda")
        scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp and config.amp_dtype == "float16")
        policies, normalise = build_policies(config), Normalise(config, world.device)
        trained = world.wrap(model, getattr(torch, config.amp_dtype), config.image_size)
        if config.compile:
            model.compile()  # in place: the state dict's keys stay as they are
        return cls(config, world, model, trained, optimizer, scaler, policies, normalise)

    def state_dict(self) -> dict[str, Any]:
        """What all processes share, and under "ranks" what each has of its own. To be called by all of them.

        Raises UserError where they have ceased to be equal.
        """
        self.world.require_equal(f"after epoch {self.epoch}: the weights", lambda: digest(self.model.state_dict()))
        self.world.require_equal(f"after epoch {self.epoch}: the policies", lambda: digest(self.policies.state_dict()))
        loss_sum_M, images = self.policies.tally
        own = {
            "devices": len(self.world.devices),
            "random": random_state(self.world.devices),
            "loss_sum_M": loss_sum_M.cpu(),
            "images": images,
        }
        return {
            "epoch": self.epoch,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "policies": self.policies.state_dict(),
            "ranks": self.world.gather(own),
        }

    def load_state_dict(self, saved: dict[str, Any], run: Path) -> None:
        """Raises UserError when the checkpoint of `run` is of another network, settings or number of processes."""
        shape, now = (len(saved["ranks"]), saved["ranks"][0]["devices"]), (self.world.size, len(self.world.devices))
        if shape != now:
            raise UserError(
                f"{run}: was trained by {shape[0]} processes on {shape[1]} devices each and can only be resumed so, "
                f"not by {now[0]} on {now[1]}"
            )
        own = saved["ranks"][self.world.rank]
        try:
            self.epoch, self.best = saved["epoch"], saved["best"]
            self.model.load_state_dict(saved["model"])
            fused = self.optimizer.param_groups[0]["fused"]
            self.optimizer.load_state_dict(saved["optimizer"])
            for group in self.optimizer.param_groups:
                group["fused"] = fused  # belongs to the device, not to the run
            self.scaler.load_state_dict(saved["scaler"])
            self.policies.load_state_dict(saved["policies"])
            self.policies.tally = Tally(own["loss_sum_M"], own["images"])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{run}: its checkpoint does not fit the settings in its config.yaml ({reason})") from None
        set_random_state(own["random"], self.world.devices)


def build_optimizer(model: nn.Module, config: Config, *, fused: bool) -> torch.optim.SGD:
    """SGD as the config says. fused: all parameters in one kernel, and no wait for float16's scaler; for CUDA."""
    optimizer = torch.optim.SGD(
        model.parameters(),
        config.lr,
        config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        fused=fused or None,
    )
    if fused and config.momentum:
        for parameter in model.parameters():  # a first step that the scaler skips would leave it whatever was there
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_one_epoch(state: TrainingState, split: Split, progress: Progress) -> tuple[dict[str, float], list[dict]]:
    """Algorithm 1, one epoch. Returns loss and accuracy over all copies, and the records of the intervals it ended.

    Afterwards the network is the same in every process. Raises FloatingPointError when the loss is no longer finite.
    """
    config, world, optimizer, policies = state.config, state.world, state.optimizer, state.policies
    batches = epoch_batches(len(split.labels), config.batch_size, config.seed, state.epoch)
    N, micro_batches = config.batch_size, world.deal(config.batch_size, config.accumulate)
    at_hand = range(N) if split.resident else range(micro_batches[0].start, micro_batches[-1].stop)
    interval = config.policy_interval or len(batches)
    loss_and_correct, seen = torch.zeros(2, dtype=torch.float64, device=world.device), 0
    intervals = []
    state.trained.train()
    reading = split.batches([batch[at_hand.start : at_hand.stop] for batch in batches], state.epoch)
    for step, (images_NCHW, labels_N) in enumerate(reading, start=state.epoch * len(batches)):
        if step % interval == 0:
            policies.resample(keyed_generator(config.seed, "policies", step // interval))
        draws = draw(state, images_NCHW, "train", step, N=N, groups=N // len(at_hand))
        inputs = (make_inputs(state, images_NCHW, labels_N, at_hand, draws, micro) for micro in micro_batches)
        loss_and_correct += take_step(state, inputs, len(micro_batches), learning_rate(config, step, len(batches)))
        seen += len(micro_batches) * len(micro_batches[0]) * config.M

        if (step + 1) % interval == 0 or step + 1 == config.epochs * len(batches):
            intervals.append({"interval": step // interval, "step": step + 1, **policies.update(world.mean)})
        progress.step(f"epoch {state.epoch + 1}/{config.epochs}", loss_and_correct, seen)
    world.even_out(state.model)
    loss, correct = world.mean(loss_and_correct / seen).tolist()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is no longer finite")
    return {"lr": optimizer.param_groups[0]["lr"], "train_loss": loss, "train_top1": correct}, intervals


class Draws(NamedTuple):
    """All that chance decides about the N * M copies of a step, drawn for the whole batch before it is dealt out."""

    crops: Crops | None
    plan: Plan
    blank_B2: Tensor


def draw(state: TrainingState, images_NCHW: Tensor, purpose: str, step: int, *, N: int, groups: int = 1) -> Draws:
    """Draws for a batch of N images like these, keyed by purpose and step; images are paired within `groups` parts."""
    config, (height, width) = state.config, images_NCHW.shape[-2:]
    crop_draws, plan_draws = (keyed_generator(config.seed, purpose, what, step) for what in ("crop", "plan"))
    blank_draws = keyed_generator(config.seed, "cutout", step)
    return Draws(
        draw_crops(N, config, crop_draws),
        state.policies.plan(N, plan_draws, groups),
        draw_centres(N * config.M, height, width, blank_draws),
    )


def augment(state: TrainingState, images_NCHW: Tensor, at_hand: range, draws: Draws, wanted: range) -> Tensor:
    """The M copies of each wanted image after crop, flip and policy, uint8 (len(wanted) * M, C, H, W), image-major.

    images_NCHW: the images of the batch that are `at_hand`; the wanted ones and their partners are among them.
    """
    M = state.config.M
    plan, outside = portion(draws.plan, wanted.start * M, wanted.stop * M)
    copies_B = torch.cat((torch.arange(wanted.start * M, wanted.stop * M), outside))
    copies_BCHW = make_copies(images_NCHW, copies_B, M, draws.crops, first=at_hand.start)
    own_BCHW, partners_BCHW = copies_BCHW.split((len(wanted) * M, len(outside)))
    return apply(own_BCHW, plan, partners_BCHW if len(outside) else None)


def make_inputs(
    state: TrainingState, images_NCHW: Tensor, labels_N: Tensor, at_hand: range, draws: Draws, wanted: range
) -> tuple[Tensor, Tensor]:
    """What the network sees of the wanted images: their augmented copies, normalised, with Cutout; and their labels."""
    M, (height, width) = state.config.M, images_NCHW.shape[-2:]
    centre_B2 = draws.blank_B2[wanted.start * M : wanted.stop * M]
    kept_B1HW = cutout_mask(state.config.cutout, centre_B2, height, width, images_NCHW.device)
    inputs_BCHW = state.normalise(augment(state, images_NCHW, at_hand, draws, wanted), kept_B1HW)
    return inputs_BCHW, labels_N[wanted.start - at_hand.start : wanted.stop - at_hand.start].repeat_interleave(M)


def take_step(state: TrainingState, inputs: Iterable[tuple[Tensor, Tensor]], micro_batches: int, lr: float) -> Tensor:
    """One step of the network on so many micro-batches of inputs_BCHW and labels_B; their losses go to the policies.

    Returns the sum of all losses and the number of right answers, float64 on the device.
    """
    loss_and_correct = torch.zeros(2, dtype=torch.float64, device=state.world.device)
    state.optimizer.zero_grad(set_to_none=True)
    for number, (inputs_BCHW, labels_B) in enumerate(inputs, start=1):
        with each_waits_for_the_last(state.trained, last=number == micro_batches):
            loss_B, correct_B = learn(state, inputs_BCHW, labels_B, micro_batches)
        state.policies.observe(loss_B.view(-1, state.config.M))
        loss_and_correct += torch.stack((loss_B.sum(), correct_B.sum()))
    descend(state, lr)
    return loss_and_correct


def learn(state: TrainingState, inputs_BCHW: Tensor, labels_B: Tensor, micro_batches: int) -> tuple[Tensor, Tensor]:
    """Forward and backward for one of the micro-batches. Returns each copy's loss, float32, and if it was right."""
    config = state.config
    with torch.autocast(inputs_BCHW.device.type, getattr(torch, config.amp_dtype), enabled=config.amp):
        logits_BC = state.trained(inputs_BCHW).float()
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=config.label_smoothing)
    state.scaler.scale(loss_B.mean() / micro_batches).backward()
    return loss_B.detach(), logits_BC.detach().argmax(1) == labels_B


def descend(state: TrainingState, lr: float) -> None:
    """Step of the network's optimizer at the given rate, for gradients scaled by the scaler."""
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
    scores = score(state.model, split, len(data.classes), state.normalise, state.world)
    state.best = max(state.best, scores.top1)
    return {f"{name}_loss": scores.loss, f"{name}_top1": scores.top1, f"{name}_top1_best_seen": state.best}


def preview_epochs(epochs: int) -> set[int]:
    """The first, the last, and about every twentieth part of the run between."""
    return {1, epochs, *range(max(1, epochs // 20), epochs, max(1, epochs // 20))}


@torch.no_grad()
def preview(state: TrainingState, split: Split) -> tuple[Tensor, list[str]]:
    """Up to eight training images under each policy in use, (M, images, C, H, W), and those policies in words."""
    images_NCHW, _ = next(iter(split.batches([balanced_order(split.labels)[:8]])))
    every = range(len(images_NCHW))
    draws = draw(state, images_NCHW, "preview", state.epoch, N=len(every))
    copies_BCHW = augment(state, images_NCHW, every, draws, every)
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


def check_support(config: Config, world: World) -> None:
    """Raises UserError for settings that these devices cannot carry out. Nothing is changed yet."""
    world.deal(config.batch_size, config.accumulate)
    if config.amp and config.amp_dtype == "float16" and world.device.type != "cuda":
        raise UserError(f"amp_dtype: float16 needs CUDA, and this run is on {world.device}; use amp_dtype: bfloat16")
    if config.compile and len(world.devices) > 1:
        raise UserError(
            f"compile: needs one process per GPU; start with torchrun --nproc_per_node {len(world.devices)}, or name "
            "one with --device cuda:0"
        )


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


def closing_words(run: Path, state: TrainingState) -> str:
    words = [
        "",
        f"The run lies in {run} ({state.epoch} of {state.config.epochs} epochs).",
        f"  score it     python evaluate.py --checkpoint {shlex.quote(str(run / 'model.pt'))}",
        f"  look at it   tensorboard --logdir {shlex.quote(str(run.parent))}",
    ]
    if state.epoch < state.config.epochs:
        words.append(f"  go on        {resume_command(state.world)}")
    return "\n".join(words)


def resume_command(world: World) -> str:
    """This command, with --resume."""
    if world.size > 1:
        return "the same command and --resume"
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
