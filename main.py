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

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before all that takes its time to import

import argparse
import math
import shlex
import signal
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from augmentations import Plan, apply, portion
from config import (
    DEFAULT_CONF,
    Config,
    add_arguments,
    load_config,
    overrides_from,
    plain_values,
    run_directory,
)
from dataloader import Crops, cutout_mask, draw_centres, draw_crops, epoch_batches, make_copies
from datasets.download import Downloads
from datasets.loading import Data, balanced_order, load_data
from datasets.splits import Split
from evaluation.predict import score
from models import build_model
from policies.files import build_policies
from policies.published import augmix_loss, mix
from training.distributed import World, each_waits_for_the_last, exit_with_status, join
from training.manager import RunManager
from training.rundirectory import check_run_directory, held, write_run_directory
from training.signals import Stopped, Terminated
from training.state import TrainingState
from utils import CommandLine, UserError, choose_kernels, duration, save_tensors, seed_default_generators

RESUMING = ("--overwrite", "--resume", "--resume-elastic", "--resume_elastic")  # what a command to go on begins without


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    with join(args.device) as world:
        train(config, args, world)


def train(config: Config, args: argparse.Namespace, world: World) -> None:
    check_support(config, world)
    run = run_directory(args, config)
    if world.is_main:
        check_run_directory(run, config, args)

    with world.main_process_first(config.fetches_data):
        data = load_data(config, world.device, Downloads(args.data_url, not args.no_download, quiet=not world.is_main))
    fingerprint = data.fingerprint()
    world.require_equal("the images", lambda: fingerprint)
    choose_kernels(world.device, config.deterministic, config.tf32)
    seed_default_generators(world.devices, config.seed, "network")
    model = build_model(config.model, len(data.classes), **config.model_options())
    seed_default_generators(world.devices, config.seed, "noise", world.rank)
    state = TrainingState.start(config, world, model.to(world.device, memory_format=torch.channels_last))

    manager = RunManager(run, state, len(data.train.labels) // config.batch_size, fingerprint)
    with held(run, config, args) if world.is_main else nullcontext():
        if args.resume:
            manager.load(elastic=args.resume_elastic)
        if world.is_main:
            write_run_directory(run, config, world.device, afresh=args.overwrite)
        try:
            with manager:
                while state.epoch < min(config.epochs, args.stop_epoch or config.epochs):
                    try:
                        run_epoch(state, data, manager)
                    except FloatingPointError as error:
                        manager.go_back(error)
                manager.progress.say(closing_words(run, state))
        except Stopped as stop:
            interruption = Terminated if stop.signum == signal.SIGTERM else KeyboardInterrupt
            raise interruption(f"{where(state)} is saved; go on with: {resume_command(world)}") from None


def run_epoch(state: TrainingState, data: Data, manager: RunManager) -> None:
    """Train for an epoch, or for what is left of it; score, log and save. Raises what the manager raises."""
    config, world, steps = state.config, state.world, manager.steps
    manager.lap("other")
    metrics = train_one_epoch(state, data.train, manager)
    world.average_batchnorm(state.model)
    manager.lap("train")
    if (state.epoch + 1) % config.eval_every == 0 or state.epoch + 1 == config.epochs:
        metrics |= score_for_the_log(state, data, manager)
    manager.lap("other")
    times = {f"{doing}_seconds": seconds for doing, seconds in state.epoch_totals.seconds.items()}
    times["images_per_second"] = steps * config.batch_size * config.M / times["train_seconds"]
    state.end_epoch()
    manager.log.epoch(state.epoch, state.epoch * steps, metrics, times)
    if world.is_main and state.epoch in preview_epochs(config.epochs):
        manager.log.policy_images(*preview(state, data.train), step=state.epoch * steps)
    if world.is_main:
        save_model(manager.run / "model.pt", state, data.classes)
    manager.save()
    manager.progress.say(epoch_line(state, metrics, times))
    manager.stop_if_requested()


def train_one_epoch(state: TrainingState, split: Split, manager: RunManager) -> dict[str, float]:
    """Algorithm 1, one epoch, or what is left of it. Returns learning rate, loss and accuracy over all copies, and
    what the last interval that it ended says of the policies.

    Raises FloatingPointError, in all processes, when a loss or a gradient is no longer finite.
    """
    config, world, policies, epoch_totals = state.config, state.world, state.policies, state.epoch_totals
    batches = epoch_batches(len(split.labels), config.batch_size, config.seed, state.epoch)
    N, micro_batches = config.batch_size, world.deal(config.batch_size, config.accumulate)
    at_hand = range(N) if split.resident else range(micro_batches[0].start, micro_batches[-1].stop)
    first, interval = state.epoch * len(batches), config.policy_interval or len(batches)
    state.trained.train()
    left = [batch[at_hand.start : at_hand.stop] for batch in batches[state.step :]]
    for step, (images_NCHW, labels_N) in enumerate(split.batches(left, state.epoch), start=first + state.step):
        if step % interval == 0:
            progress = Fraction(step, config.epochs * len(batches))
            policies.resample(state.keyed("policies", step // interval), progress)
        draws = draw(state, images_NCHW, "train", step, N=N, groups=N // len(at_hand))
        inputs = (make_inputs(state, images_NCHW, labels_N, at_hand, draws, micro) for micro in micro_batches)
        epoch_totals.loss_and_correct += take_step(
            state, inputs, len(micro_batches), learning_rate(config, step, len(batches))
        )
        epoch_totals.copies += len(micro_batches) * len(micro_batches[0]) * config.M
        state.step += 1
        if (step + 1) % interval == 0 or step + 1 == config.epochs * len(batches):
            state.require_finite()
            record = {"interval": step // interval, "step": step + 1, **policies.update(world.mean)}
            epoch_totals.adversary = {name: record[name] for name in ("entropy", "loss_spread")}
            manager.after_interval(record)
        manager.after_step()
    state.require_finite()
    loss, correct = world.mean(epoch_totals.loss_and_correct / epoch_totals.copies).tolist()
    skipped = {"skipped_steps": int(state.monitor.skipped)} if state.scaler.is_enabled() else {}
    lr = state.optimizer.param_groups[0]["lr"]
    return {"lr": lr, "train_loss": loss, "train_top1": correct, **skipped, **epoch_totals.adversary}


class Draws(NamedTuple):
    """All that chance decides about the N * M copies of a step, drawn for the whole batch before it is dealt out."""

    crops: Crops | None
    plan: Plan
    weight_BV: Tensor | None  # of the views that a copy is mixed of
    blank_B2: Tensor


def draw(state: TrainingState, images_NCHW: Tensor, purpose: str, step: int, *, N: int, groups: int = 1) -> Draws:
    """Draws for a batch of N images like these, keyed by purpose and step; images are paired within `groups` parts."""
    config, (height, width) = state.config, images_NCHW.shape[-2:]
    crop_draws, plan_draws = (state.keyed(purpose, what, step) for what in ("crop", "plan"))
    blank_draws = state.keyed("cutout", step)
    return Draws(
        draw_crops(N, config, crop_draws),
        state.policies.plan(N, (height, width), plan_draws, groups),
        state.policies.weights(N, plan_draws),
        draw_centres(N * config.M, height, width, blank_draws),
    )


def augment(state: TrainingState, images_NCHW: Tensor, at_hand: range, draws: Draws, wanted: range) -> Tensor:
    """The M copies of each wanted image after crop, flip and policy, uint8 (len(wanted) * M, C, H, W), image-major.

    Where the source mixes a copy of V views, each view of the same crop is augmented, and the mixture is float32.
    images_NCHW: the images of the batch that are `at_hand`; the wanted ones and their partners are among them.
    """
    M, V = state.config.M, state.policies.views
    first, last = wanted.start * M * V, wanted.stop * M * V
    plan, outside = portion(draws.plan, first, last)
    copies_B = torch.cat((torch.arange(first, last), outside)) // V
    copies_BCHW = make_copies(images_NCHW, copies_B, M, draws.crops, first=at_hand.start)
    own_BCHW, partners_BCHW = copies_BCHW.split((last - first, len(outside)))
    augmented_BCHW = apply(own_BCHW, plan, partners_BCHW if len(outside) else None)
    if draws.weight_BV is None:
        return augmented_BCHW
    return mix(augmented_BCHW, draws.weight_BV[wanted.start * M : wanted.stop * M])


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
    losses, teacher_losses = [], []
    state.optimizer.zero_grad(set_to_none=True)
    for number, (inputs_BCHW, labels_B) in enumerate(inputs, start=1):
        with each_waits_for_the_last(state.trained, last=number == micro_batches):
            loss_B, correct_B = learn(state, inputs_BCHW, labels_B, micro_batches)
        loss_and_correct += torch.stack((loss_B.sum(), correct_B.sum()))
        losses.append(loss_B.view(-1, state.config.M))
        if state.teacher:
            teacher_losses.append(judge(state, inputs_BCHW, labels_B).view(-1, state.config.M))
    state.policies.observe(torch.cat(losses), torch.cat(teacher_losses) if teacher_losses else None)
    gradient_norm = descend(state, lr)
    if state.teacher:
        state.teacher.follow(state.model)
    loss_sum_M = state.policies.loss_sums.loss_sum_M
    state.monitor.observe(state.step, loss_sum_M, gradient_norm, scaled=state.scaler.is_enabled())
    return loss_and_correct


def learn(state: TrainingState, inputs_BCHW: Tensor, labels_B: Tensor, micro_batches: int) -> tuple[Tensor, Tensor]:
    """Forward and backward for one of the micro-batches. Returns each copy's loss, float32, and if it was right."""
    config = state.config
    with state.precision():
        logits_BC = state.trained(inputs_BCHW).float()
    loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=config.label_smoothing)
    objective = augmix_loss(loss_B, logits_BC, config.M, config.jsd) if config.jsd else loss_B.mean()
    state.scaler.scale(objective / micro_batches).backward()
    return loss_B.detach(), logits_BC.detach().argmax(1) == labels_B


@torch.no_grad()
def judge(state: TrainingState, inputs_BCHW: Tensor, labels_B: Tensor) -> Tensor:
    """The teacher's loss on each copy, float32."""
    with state.precision():
        logits_BC = state.teacher(inputs_BCHW).float()
    return F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=state.config.label_smoothing)


def descend(state: TrainingState, lr: float) -> Tensor:
    """Step of the network's optimizer at the given rate, for gradients scaled by the scaler. Returns their norm."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.unscale_(state.optimizer)
    gradients = [p.grad for p in state.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if state.config.grad_clip:
        nn.utils.clip_grads_with_norm_(state.model.parameters(), state.config.grad_clip, norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    return norm


def learning_rate(config: Config, step: int, steps_per_epoch: int) -> float:
    """Rate for the given step of the run: linear warm-up, then cosine to zero or drops at the milestones."""
    epoch = step / steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.lr * min(1.0, (step + 1) / (config.warmup_epochs * steps_per_epoch))
    if config.schedule == "step":
        return config.lr * config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def score_for_the_log(state: TrainingState, data: Data, manager: RunManager) -> dict[str, float]:
    """Loss and accuracy on the held-out part or, without one, on the test set. Nothing is chosen by them."""
    name, split = ("test", data.test) if data.valid is None else ("valid", data.valid)
    stopped = lambda: bool(manager.stop_request.signum)  # noqa: E731
    scores = score(state.model, split, len(data.classes), state.normalise, state.world, stopped)
    manager.stop_if_requested()
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
    copies_BCHW = augment(state, images_NCHW, every, draws, every).round().to(torch.uint8)
    return copies_BCHW.unflatten(0, (-1, state.config.M)).transpose(0, 1), state.policies.describe()


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="main.py", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--M", help="policies in use at a time; every image is seen once per policy")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--resume", action="store_true", help="go on exactly where the run stopped")
    parser.add_argument(
        "--resume-elastic",
        "--resume_elastic",
        action="store_true",
        help="with another number of processes or devices go on too: from the epoch's start, not exactly",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete the run of that name and start anew")
    parser.add_argument(
        "--stop_epoch", type=int, metavar="E", help="stop after E epochs; the schedule's horizon is unchanged"
    )
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    args.resume = args.resume or args.resume_elastic
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.stop_epoch is not None and args.stop_epoch < 1:
        parser.error(f"--stop_epoch: {args.stop_epoch} must be at least 1")
    return args


def check_support(config: Config, world: World) -> None:
    """Raises UserError for settings that these devices or files cannot carry out. Nothing is changed or loaded yet."""
    world.deal(config.batch_size, config.accumulate)
    if config.policy_from:
        build_policies(config)
    if config.amp and config.amp_dtype == "float16" and world.device.type != "cuda":
        raise UserError(f"amp_dtype: float16 needs CUDA, and this run is on {world.device}; use amp_dtype: bfloat16")
    if config.compile and len(world.devices) > 1:
        raise UserError(
            f"compile: needs one process per GPU; start with torchrun --nproc_per_node {len(world.devices)}, or name "
            "one with --device cuda:0"
        )


def save_model(path: Path, state: TrainingState, classes: tuple[str, ...]) -> None:
    """The weights and what evaluate.py needs to use them, and the controller; tensors and plain values only."""
    content = {
        "model": state.model.state_dict(),
        "classes": list(classes),
        "epoch": state.epoch,
        "config": plain_values(state.config),
    }
    if state.policies.learns:
        content["controller"] = state.policies.controller.state_dict()
    save_tensors(path, content)


def where(state: TrainingState) -> str:
    """How far the run has come, in words."""
    return f"step {state.step} of epoch {state.epoch + 1}" if state.step else f"epoch {state.epoch}"


def epoch_line(state: TrainingState, metrics: dict[str, float], times: dict[str, float]) -> str:
    words = [
        f"epoch {state.epoch}/{state.config.epochs}",
        f"loss {metrics['train_loss']:.3f}",
        f"accuracy {metrics['train_top1']:.1%}",
    ]
    for name in ("test", "valid"):
        if f"{name}_top1" in metrics:
            words += [f"{name} loss {metrics[f'{name}_loss']:.3f}", f"{name} accuracy {metrics[f'{name}_top1']:.1%}"]
    if metrics.get("skipped_steps"):
        words.append(f"{metrics['skipped_steps']} steps skipped (float16)")
    left = (state.config.epochs - state.epoch) * (times["train_seconds"] + times["other_seconds"])
    return ", ".join([*words, f"{times['images_per_second']:,.0f} images/s", f"{duration(left)} left"])


def closing_words(run: Path, state: TrainingState) -> str:
    words = [
        "",
        f"The run lies in {run} ({state.epoch} of {state.config.epochs} epochs).",
        f"  score it     {in_shell('evaluate.py', '--checkpoint', str(run / 'model.pt'))}",
        f"  look at it   tensorboard --logdir {shlex.quote(str(run.parent))}",
    ]
    if state.epoch < state.config.epochs:
        words.append(f"  go on        {resume_command(state.world)}")
    if state.collapse.intervals:
        words.append(
            f"The controller collapsed: in {state.collapse.intervals} intervals, first after step "
            f"{state.collapse.first}; policies.jsonl says how."
        )
    if state.rewinds:
        times = "once" if state.rewinds == 1 else f"{state.rewinds} times"
        words.append(f"Numbers were not finite {times}: incidents.jsonl says where.")
    return "\n".join(words)


def resume_command(world: World) -> str:
    """This command, with --resume."""
    if world.in_group:
        without = ", without --stop_epoch" if any(word.startswith("--stop_epoch") for word in sys.argv) else ""
        return f"the same command and --resume{without}"
    words, left_out = [], 0
    for word in sys.argv[1:]:
        if word == "--stop_epoch":
            left_out = 2
        if left_out == 0 and word not in RESUMING and not word.startswith("--stop_epoch="):
            words.append(word)
        left_out = max(0, left_out - 1)
    return in_shell("main.py", *words, "--resume")


def in_shell(script: str, *arguments: str) -> str:
    """The command that runs a script beside this one from where this one was started."""
    return shlex.join(["python", str(Path(sys.argv[0]).parent / script), *arguments])


if __name__ == "__main__":
    exit_with_status(main)
