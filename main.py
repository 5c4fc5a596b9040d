"""Train an image classifier against an adversary that learns its augmentation policies (arXiv 1912.11188, Algorithm 1).

    python main.py                                            # confs/demo.yaml: embedded data, CPU, a minute or two
    python main.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --M 8 --seed 0 --amp
    torchrun --nproc_per_node 8 main.py --load_conf ... --amp             # a process per GPU
    python main.py --load_conf ... --logdir ./logs --seed 0 --resume      # continue exactly where it stopped
    python main.py --load_conf ... --set policy=random lr=0.05 --name control   # any setting of config.py

Each batch of N images becomes N * M copies, every image once per policy, in one forward pass. The network (weights w)
descends the mean loss; at the end of an interval the controller (parameters theta) ascends the M policies' mean losses.

Shape suffixes: N distinct images of a batch, M policies, B copies of a micro-batch, image-major: copy m of image n is
number n * M + m; C, H, W as usual, but for logits_BC, where C counts classes.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before the imports that take time

import argparse
import math
from contextlib import nullcontext
from fractions import Fraction

import torch
from torch import Tensor, nn

from config import (
    DEFAULT_CONF,
    Config,
    add_arguments,
    load_config,
    overrides_from,
    run_directory,
    warn_of_settings,
)
from dataloader import MicroBatches, load_data
from datasets.download import Downloads
from datasets.loading import Data
from datasets.splits import Split
from evaluation.predict import score
from models import build_model
from policies.answers import Answers, MixedLabels
from policies.published import augmix_loss
from policies.selection import chosen_copies
from training.distributed import World, gradients_synchronised, join
from training.exit import exit_with_status
from training.log import closing_message, header, interruption
from training.manager import RunManager
from training.rundirectory import check_run_directory, locked_run_directory, write_run_directory
from training.signals import Stopped
from training.state import TrainingState, batch_statistics, check_support
from utils import CommandLine, choose_kernels, seed_default_generators


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    with join(args.device) as world:
        train(config, args, world)


def train(config: Config, args: argparse.Namespace, world: World) -> None:
    """Set up the run that the arguments describe, and train it to its end."""
    check_support(config, world)
    run = run_directory(args, config)
    if world.is_main:
        warn_of_settings(config, args)
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

    with locked_run_directory(run, config, args) if world.is_main else nullcontext():
        if args.resume:
            manager.load(elastic=args.resume_elastic)
        if world.is_main:
            write_run_directory(run, config, world.device, overwrite=args.overwrite)
            print(header(run, state, data), flush=True)
        try:
            with manager:
                while state.epoch < min(config.epochs, args.stop_epoch or config.epochs):
                    try:
                        run_epoch(state, data, manager)
                    except FloatingPointError as error:
                        manager.rewind(error)
        except Stopped as stop:
            raise interruption(stop, state) from None
        if world.is_main:
            print(closing_message(run, state), flush=True)


def run_epoch(state: TrainingState, data: Data, manager: RunManager) -> None:
    """Train for an epoch, or for the rest of it; score, log and save. Raises what the manager raises."""
    manager.lap("other")
    metrics = train_one_epoch(state, data.train, manager)
    state.world.average_batchnorm(state.model)
    if state.ema:
        state.world.average_batchnorm(state.ema.model)
    manager.lap("train")
    if (state.epoch + 1) % state.config.eval_every == 0 or state.epoch + 1 == state.config.epochs:
        metrics |= score_for_the_log(state, data, manager)
    manager.end_epoch(metrics, data)


def train_one_epoch(state: TrainingState, split: Split, manager: RunManager) -> dict[str, float]:
    """Algorithm 1 for one epoch, or for the rest of it.

    Returns learning rate, loss and accuracy over all copies, and what the last interval says of the policies. Raises
    FloatingPointError, in all processes, when a loss or a gradient is no longer finite.
    """
    config, policies, totals = state.config, state.policies, state.epoch_totals
    loader = state.loader(split)
    last, interval = config.epochs * len(loader), config.policy_interval or len(loader)
    state.trained.train()
    for step, micro_batches in loader.steps(state.epoch, state.step):
        if step % interval == 0:  # sample M policies, with probabilities p_1 .. p_M
            policies.resample(state.keyed("policies", step // interval), Fraction(step, last))
        totals.loss_and_correct += take_step(state, micro_batches, learning_rate(config, step, len(loader)))
        totals.copies += loader.copies
        state.step += 1
        if (step + 1) % interval == 0 or step + 1 == last:  # theta <- theta + grad (1/M) sum_m L~_m log p_m
            state.require_finite()
            record = {"interval": step // interval, "step": step + 1, **policies.update(state.world.mean)}
            totals.adversary = {name: record[name] for name in ("entropy", "loss_spread")}
            manager.after_interval(record)
        manager.after_step()
    state.require_finite()
    loss, correct = state.world.mean(totals.loss_and_correct / totals.copies).tolist()
    skipped = {"skipped_steps": int(state.monitor.skipped)} if state.scaler.is_enabled() else {}
    lr = state.optimizer.param_groups[0]["lr"]
    return {"lr": lr, "train_loss": loss, "train_top1": correct, **skipped, **totals.adversary}


def take_step(state: TrainingState, micro_batches: MicroBatches, lr: float) -> Tensor:
    """One step of the network on the mean loss of this step's copies; the losses of all N * M go to the policies.

    Returns the sum of all losses and the number of right answers, float64 on the device.
    """
    M, draws = state.config.M, state.selection_draws()
    loss_and_correct = torch.zeros(2, dtype=torch.float64, device=state.world.device)
    seen, by_teacher = [], []
    state.optimizer.zero_grad(set_to_none=True)
    for number, (inputs_BCHW, labels_B) in enumerate(micro_batches):
        if state.teacher:
            by_teacher.append(judge(state, state.teacher.network, inputs_BCHW, labels_B).loss_B)
        with gradients_synchronised(state.trained, on=number + 1 == state.micro_batches):
            if draws is None:
                answers = learn(state, inputs_BCHW, labels_B)
            else:  # from some copies of each image, once all have been judged
                answers = judge(state, state.trained, inputs_BCHW, labels_B)
                losses = (loss_B.view(-1, M) for loss_B in (answers.loss_B, *by_teacher[number:]))
                kept_B = chosen_copies(state.config.keep_by, state.config.keep, draws[number], *losses)
                kept_labels_B = labels_B.select(kept_B) if isinstance(labels_B, MixedLabels) else labels_B[kept_B]
                learn(state, inputs_BCHW[kept_B], kept_labels_B)
        loss_and_correct += torch.stack((answers.loss_B.sum(), answers.right_B.sum()))
        seen.append(answers)
    loss_NM, reward_NM, _ = (torch.cat(parts).view(-1, M) for parts in zip(*seen, strict=True))
    state.policies.observe(loss_NM, torch.cat(by_teacher).view(-1, M) if by_teacher else None, reward_NM)  # L^_m
    gradient_norm = descend(state, lr)  # w <- w - lr * grad (1/(M N)) sum_m sum_n loss_mn
    for average in state.averages.values():
        average.follow(state.model)
    loss_sum_M = state.policies.loss_sums.loss_sum_M
    state.monitor.observe(state.step, loss_sum_M, gradient_norm, scaled=state.scaler.is_enabled())
    return loss_and_correct


def learn(state: TrainingState, inputs_BCHW: Tensor, labels_B: Tensor | MixedLabels) -> Answers:
    """Forward and backward for a micro-batch, or for the copies selected from one."""
    config = state.config
    with state.precision():
        logits_BC = state.trained(inputs_BCHW).float()
    answers = Answers.of(logits_BC, labels_B, config)
    objective = augmix_loss(answers.loss_B, logits_BC, config.M, config.jsd) if config.jsd else answers.loss_B.mean()
    state.scaler.scale(objective / state.micro_batches).backward()
    return answers._replace(loss_B=answers.loss_B.detach())


@torch.no_grad()
def judge(state: TrainingState, network: nn.Module, inputs_BCHW: Tensor, labels_B: Tensor | MixedLabels) -> Answers:
    """The answers of a network in training mode, whose running statistics stay as they are."""
    with state.precision(), batch_statistics(network):
        logits_BC = network(inputs_BCHW).float()
    return Answers.of(logits_BC, labels_B, state.config)


def descend(state: TrainingState, lr: float) -> Tensor:
    """The optimizer's step at the given rate, on gradients scaled by the scaler. Returns the gradients' norm."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
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
    how = split, len(data.classes), state.normalise, state.world, manager.is_stop_requested
    scores = score(state.model, *how)
    averaged = score(state.ema.model, *how) if state.ema else None
    manager.stop_if_requested()
    state.best = max(state.best, scores.top1)
    metrics = {f"{name}_loss": scores.loss, f"{name}_top1": scores.top1, f"{name}_top1_best_seen": state.best}
    return metrics | ({f"{name}_ema_loss": averaged.loss, f"{name}_ema_top1": averaged.top1} if averaged else {})


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="main.py", description=__doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--M", help="policies in use at a time; every image is seen once per policy")
    add("--amp", action="store_true", help="mixed precision")
    add("--resume", action="store_true", help="continue exactly where the run stopped")
    elastic = "continue with another number of processes, or on other devices: from the start of the epoch, not exactly"
    add("--resume-elastic", "--resume_elastic", action="store_true", help=elastic)
    add("--overwrite", action="store_true", help="delete the run of that name and start from scratch")
    add("--stop_epoch", type=int, metavar="E", help="stop after E epochs; the learning-rate schedule is unchanged")
    add("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    args.resume = args.resume or args.resume_elastic
    if args.resume and args.overwrite:
        parser.error("--resume and --overwrite exclude each other")
    if args.stop_epoch is not None and args.stop_epoch < 1:
        parser.error(f"--stop_epoch: {args.stop_epoch} must be at least 1")
    return args


if __name__ == "__main__":
    exit_with_status(main)
