"""Score a checkpoint on the test set; every reported number comes from here.

    python evaluate.py                                                  # the run that a plain `python main.py` made
    python evaluate.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --seed 0
    python evaluate.py --checkpoint FILE                                # any model.pt
    python evaluate.py --model wresnet40_2 --weights FILE --load_conf CONF   # anybody's state dict, on CONF's data
    torchrun --nproc_per_node 8 evaluate.py ...                         # the same numbers from several processes

The run is found by the arguments it was trained with. Writes results.json beside the checkpoint.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_tensors, sha256_of, write_text
from config import DEFAULT_CONF, Config, add_arguments, load_config, overrides_from, plain_values, run_directory
from dataloader import Normalise, Split, load_test
from models import build_model
from processes import World, exit_with_status, join
from utils import CommandLine, UserError, environment

BATCH = 256  # images in a forward pass; of no influence on the counts


@dataclass(frozen=True)
class Scores:
    """Counts over exactly the images of a split; loss is the mean cross-entropy in nats."""

    images: int
    top1_correct: int
    top5_correct: int | None  # None with five classes or fewer, where it says nothing
    loss: float
    class_images: list[int]
    class_correct: list[int]

    @property
    def top1(self) -> float:
        return self.top1_correct / self.images

    @property
    def top5(self) -> float | None:
        return None if self.top5_correct is None else self.top5_correct / self.images


def main() -> None:
    args = parse_arguments()
    with join(args.device) as world:
        evaluate(args, world)


def evaluate(args: argparse.Namespace, world: World) -> None:
    subject = plain_state_dict(args) if args.weights else trained_here(args)
    config = subject.config
    with world.one_first(config.fetches_data):
        split, classes = load_test(config, world.device, subject.classes, quiet=not world.leads)
    world.require_equal("the test images", split.fingerprint)
    model = build_model(config.model, len(classes), **config.model_options())
    load_weights(model, subject.weights, subject.file, config, len(classes))
    model = model.to(world.device, memory_format=torch.channels_last)
    scores = score(model, split, len(classes), Normalise(config, world.device), world, progress=True)
    if world.leads:
        results = report(subject, config, scores, classes) | {"environment": environment(world.device)}
        beside = "results.json" if args.weights is None else f"{subject.file.name}.results.json"
        output = args.output or subject.file.parent / beside
        write_text(output, json.dumps(results, indent=2) + "\n")
        print(table(subject, config, scores, classes))
        print(f"\nwritten to {output}")


@torch.no_grad()
def score(
    model: nn.Module, split: Split, num_classes: int, normalise: Normalise, world: World, *, progress: bool = False
) -> Scores:
    """Score `model`, in evaluation mode and float32, on every image of `split`; the model's mode is put back.

    The processes take the batches in turn. All batches have one shape, the last one filled up with images that do not
    count, and results are put together by image: the scores are the same for any number of processes.

    Shape suffixes: B images of a batch; C, H, W as usual, but for logits_BC, where C counts classes.
    """
    was_training = model.training
    model.eval()
    batches = torch.arange(len(split.labels)).split(BATCH)
    size = len(batches[0])
    mine = batches[world.rank :: world.size]
    shown = progress and world.leads
    results = torch.zeros(len(split.labels), 3, dtype=torch.float64, device=world.device)  # loss, first, among five
    reading = tqdm(split.batches(mine), "scoring", len(mine), leave=False, disable=None if shown else True)
    for index, (images_BCHW, labels_B) in zip(mine, reading, strict=True):
        filled_BCHW = torch.cat((images_BCHW, images_BCHW[:1].expand(size - len(index), -1, -1, -1)))
        inputs_BCHW = normalise(filled_BCHW).contiguous(memory_format=torch.channels_last)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            # forward() itself: a compiled network is scored as an uncompiled one, and not compiled anew for it
            logits_BC = model.forward(inputs_BCHW)[: len(index)].float()
        guesses = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices == labels_B[:, None]
        loss_B = F.cross_entropy(logits_BC, labels_B, reduction="none")
        results[index[0] : index[-1] + 1] = torch.stack((loss_B, guesses[:, 0], guesses.any(1)), dim=1).double()
    model.train(was_training)
    loss_B, first_B, among_five_B = world.sum(results).cpu().unbind(1)
    return Scores(
        images=len(first_B),
        top1_correct=int(first_B.sum()),
        top5_correct=int(among_five_B.sum()) if num_classes > 5 else None,
        loss=loss_B.mean().item(),
        class_images=split.labels.bincount(minlength=num_classes).tolist(),
        class_correct=split.labels[first_B.bool()].bincount(minlength=num_classes).tolist(),
    )


@dataclass(frozen=True)
class Subject:
    """What is to be scored: weights, the network and data they are for. classes: None where the file does not say."""

    file: Path
    weights: dict[str, Tensor]
    config: Config
    classes: tuple[str, ...] | None
    epoch: int | None


def trained_here(args: argparse.Namespace) -> Subject:
    """A model.pt of main.py: the one named, or that of the run with the same arguments. Raises UserError."""
    overrides = overrides_from(args)
    asked = load_config(args.load_conf or DEFAULT_CONF, overrides) if args.load_conf or not args.checkpoint else None
    file = args.checkpoint or run_directory(args, asked) / "model.pt"
    if not file.exists():
        known = sorted(str(path.parent) for path in args.logdir.glob("*/model.pt"))
        remedy = (
            f"runs with one: {', '.join(known)}"
            if known
            else "train one with main.py, or name a file with --checkpoint"
        )
        raise UserError(f"{file}: there is no such checkpoint; {remedy}")
    content = load_tensors(file)
    if not isinstance(content, dict) or not {"model", "classes", "config", "epoch"} <= content.keys():
        raise UserError(f"{file}: is no model.pt of main.py; score a plain state dict with --model NAME --weights FILE")
    config = load_config(None, {field: (str(file), value) for field, value in content["config"].items()} | overrides)
    named = args.checkpoint or args.name
    if named and args.load_conf and (asked.model, asked.dataset) != (config.model, config.dataset):
        raise UserError(
            f"{file}: is a {config.model} for {config.dataset}, but {args.load_conf} asks for "
            f"a {asked.model} for {asked.dataset}; leave out --load_conf, or name another checkpoint"
        )
    return Subject(file, content["model"], config, tuple(content["classes"]), content["epoch"])


def plain_state_dict(args: argparse.Namespace) -> Subject:
    """Anybody's state dict, also nested in a training checkpoint or saved from a wrapped module. Raises UserError."""
    said = overrides_from(args) | {"model": ("--model", args.model)}
    content = load_tensors(args.weights)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{args.weights}: holds no state dict (names with tensors)")
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in content.items()}
    return Subject(args.weights, weights, load_config(args.load_conf or DEFAULT_CONF, said), None, None)


def load_weights(model: nn.Module, weights: dict[str, Tensor], file: Path, config: Config, num_classes: int) -> None:
    """Fill `model`. Raises UserError that names the first tensors that do not fit."""
    own = model.state_dict()
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{name} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise UserError(
            f"{file}: does not fit {config.model} with {num_classes} classes: {'; '.join(problems[:2])}{more}"
        )
    model.load_state_dict(weights)


def report(subject: Subject, config: Config, scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    """The content of results.json: shares in 0..1, counts, and what they are of."""
    return {
        "checkpoint": str(subject.file),
        "sha256": sha256_of(subject.file),
        "epoch": subject.epoch,
        "dataset": config.dataset,
        "images": scores.images,
        "top1": scores.top1,
        "top5": scores.top5,
        "loss": scores.loss,
        "per_class": {
            name: {"images": images, "correct": correct, "top1": correct / images if images else None}
            for name, images, correct in zip(classes, scores.class_images, scores.class_correct, strict=True)
        },
        "config": plain_values(config),
    }


def table(subject: Subject, config: Config, scores: Scores, classes: tuple[str, ...]) -> str:
    """The scores in words for a terminal; of more than twenty classes the ten with the most errors."""
    trained = f", after epoch {subject.epoch} of {config.epochs}" if subject.epoch is not None else ""
    lines = [
        f"{subject.file}: {config.model}{trained}, on {scores.images:,} test images of {config.dataset}",
        "",
        f"{'top-1':<16}{scores.top1:>9.2%}   ({scores.top1_correct:,} correct; error {1 - scores.top1:.2%})",
    ]
    if scores.top5 is not None:
        lines.append(f"{'top-5':<16}{scores.top5:>9.2%}")
    lines += [f"{'loss':<16}{scores.loss:>9.4f}", ""]
    rows = [
        (correct / images, name, images)
        for name, images, correct in zip(classes, scores.class_images, scores.class_correct, strict=True)
        if images
    ]
    if len(rows) > 20:
        lines.append(f"the ten weakest of {len(rows)} classes:")
        rows = sorted(rows)[:10]
    width = max(16, 1 + max(len(name) for _, name, _ in rows))
    return "\n".join([*lines, *(f"{name:<{width}}{share:>9.2%}   of {images:,}" for share, name, images in rows)])


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="evaluate.py", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a model.pt, wherever it lies")
    parser.add_argument("--model", metavar="NAME", help="network of the --weights")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="a plain state dict")
    parser.add_argument("--output", type=Path, metavar="FILE", help="results.json (default: beside the checkpoint)")
    parser.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no directory {args.output.parent}")
    if (args.model is None) != (args.weights is None):
        parser.error("--model and --weights go together")
    if args.weights and args.checkpoint:
        parser.error("--weights and --checkpoint exclude each other")
    return args


if __name__ == "__main__":
    exit_with_status(main)
