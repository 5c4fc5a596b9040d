"""Score checkpoints on test sets and robustness benchmarks; every reported number comes from here.

    python evaluate.py                                                  # the run that a plain `python main.py` made
    python evaluate.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --seed 0 1 2
    python evaluate.py --checkpoint FILE --benchmarks clean cifar10-c   # any model.pt; robustness.py lists benchmarks
    python evaluate.py --model wresnet40_2 --weights FILE --benchmarks cifar10-c     # anybody's state dict
    torchrun --nproc_per_node 8 evaluate.py ...                         # the same numbers from several processes
    python evaluate.py --compare logs/*/results.json                    # a table beside the published numbers

A run is found by the arguments it was trained with. results.json is written beside the checkpoint after every cell
(a test set, or a corruption at a severity): a stopped evaluation goes on with those it has.

Shape suffixes: B images of a batch, I of a split; V sequences of T frames; C, H, W as usual, but for logits_BC, where C
counts classes.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before all that takes its time to import

import argparse
import dataclasses
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import (
    DEFAULT_CONF,
    Config,
    add_arguments,
    load_config,
    overrides_from,
    plain_values,
    run_directory,
    stays_below,
)
from dataloader import Normalise
from datasets.download import Downloads, Missing
from evaluation.benchmarks import BENCHMARKS, Benchmark, BenchmarkSpec, EvalRequest, LookOnly, Subset, fits, named
from evaluation.metrics import Predictions, measure
from evaluation.plots import draw_pictures
from evaluation.predict import BATCH, predict
from evaluation.results import Results
from evaluation.tables import FORMATS, compare, report
from models import build_model
from training.distributed import World, join
from training.exit import exit_with_status
from training.lock import sole_writer
from training.log import ImageProgress
from utils import CommandLine, UserError, environment, has_shape, load_hashed, printable, warn

# The settings that scores depend on; all others are those of the training, whatever is said when it is scored.
SCORING = ("model", "dropout", "dataset", "image_size", "eval_view", "skip_unreadable", "mean", "std")


@dataclass(frozen=True)
class Subject:
    """What is to be scored: weights, the network and data they are for.

    config: settings to score with. trained_with: those of the training; None, as epoch and classes, where the file does
    not say: it is not one of main.py. look_only: its dataroot is outside the working directory, and only the file says
    that data lie there.
    """

    file: Path
    sha256: str
    weights: dict[str, Tensor]
    config: Config
    num_classes: int
    classes: tuple[str, ...] | None = None
    trained_with: Config | None = None
    epoch: int | None = None
    look_only: bool = False


def main() -> None:
    args = parse_arguments()
    if args.compare:
        print(compare(args.compare, args.format or "markdown"))
        return
    with join(args.device) as world:
        subjects = [plain_state_dict(one) if one.weights else trained_here(one) for one in one_by_one(args)]
        results = [evaluate(subject, args, world) for subject in subjects]
        if world.is_main:
            print(report(results, args.format or "table"))


def evaluate(subject: Subject, args: argparse.Namespace, world: World) -> dict[str, Any]:
    """Score one checkpoint on the benchmarks asked for; returns what its results.json says of them."""
    file = results_file(subject, args)
    with sole_writer(file, "name another file with --output") if world.is_main else nullcontext():
        return score_benchmarks(subject, args, world, file)


def score_benchmarks(subject: Subject, args: argparse.Namespace, world: World, file: Path) -> dict[str, Any]:
    """`evaluate`, for the one that writes to `file`."""
    config, num_classes = subject.config, subject.num_classes
    with torch.device("meta"):  # the settings are the file's, too: what they ask for may be larger than any memory
        check_weights(build_model(config.model, num_classes, **config.model_options()), subject)
    model = build_model(config.model, num_classes, **config.model_options())
    model.load_state_dict(subject.weights)
    model = model.to(world.device, memory_format=torch.channels_last)
    how = LookOnly if subject.look_only else Downloads
    downloads = how(args.data_url, not args.no_download, quiet=not world.is_main)
    with world.main_process_first(config.fetches_data or args.benchmarks != ["clean"]):
        wanted = EvalRequest(config, subject.classes, num_classes, world.device, downloads)
        benchmarks = open_benchmarks(args.benchmarks, wanted)
    world.require_equal("the images", lambda: [(benchmark.name, benchmark.fingerprint) for benchmark in benchmarks])

    results = begin_results(subject, args, benchmarks, world, file)
    normalise = Normalise(config, world.device)
    progress = ImageProgress(sum(c.images for b in benchmarks for c in results.lacking(b)), shown=world.is_main)
    try:
        for benchmark in benchmarks:
            lacking = results.lacking(benchmark)
            for cell in lacking:
                progress.begin(describe(benchmark, cell))
                started = time.perf_counter()
                how = {"batch": args.batch_size, "bfloat16": args.bfloat16, "progress": progress.update}
                predictions = predict(model, cell.open(), normalise, world, **how)
                seconds = time.perf_counter() - started
                check(predictions, benchmark, cell)
                place = {"part": cell.part, "severity": cell.severity, "images": cell.images}
                record = measure(benchmark.kind, predictions, num_classes, part=cell.part, frames=cell.frames)
                results.add(benchmark, place | record, seconds)
            if world.is_main and (lacking or not any(results.pictures.glob(f"{benchmark.name}_*.png"))):
                draw_pictures(results.pictures, benchmark, results.of(benchmark), subject.classes)
    except KeyboardInterrupt as stop:
        without = " without --overwrite" if args.overwrite else ""
        raise type(stop)(f"what was scored is kept; the same command{without} goes on with the rest") from None
    finally:
        progress.close()
    return results.head | {"benchmarks": {benchmark.name: results.of(benchmark) for benchmark in benchmarks}}


def open_benchmarks(names: list[str], wanted: EvalRequest) -> list[Benchmark]:
    """The named benchmarks, checked. "all": those that fit the classifier and can be had; the others are named.

    Raises UserError for one that does not fit, is missing, or is not what it should be.
    """
    fitting = [entry for entry in BENCHMARKS if fits(entry, wanted)]
    if names == ["all"]:
        there = [benchmark for entry in fitting if (benchmark := _open_if_there(entry, wanted))]
        if not there:
            raise UserError(f"--benchmarks all: none of those that fit is in {wanted.root}, or can be had")
        return there
    entries = [named(name) for name in dict.fromkeys(names)]
    for entry in entries:
        if entry not in fitting:
            known = ", ".join(other.name for other in fitting)
            raise UserError(
                f"--benchmarks {entry.name}: is for {entry.family}'s classes and image size, and this classifier for "
                f"{wanted.num_classes} classes of {wanted.config.dataset}; those that fit are {known}"
            )
    return [entry.open(entry, wanted) for entry in entries]


def _open_if_there(entry: BenchmarkSpec, wanted: EvalRequest) -> Benchmark | None:
    try:
        return entry.open(entry, wanted)
    except Missing as error:
        if not wanted.downloads.quiet:
            warn(f"{entry.name} is left out: {error}")
        return None


def results_file(subject: Subject, args: argparse.Namespace) -> Path:
    """Where it is asked for, or beside the checkpoint."""
    beside = "results.json" if subject.file.name == "model.pt" else f"{subject.file.name}.results.json"
    return args.output or subject.file.parent / beside


def begin_results(
    subject: Subject, args: argparse.Namespace, benchmarks: list[Benchmark], world: World, file: Path
) -> Results:
    """Results in `file`, with what was scored before and is still true."""
    trained_with = subject.trained_with
    head = {
        "checkpoint": str(subject.file),
        "sha256": subject.sha256,
        "conf": args.load_conf and str(args.load_conf),
        "model": subject.config.model,
        "seed": trained_with and trained_with.seed,
        "epoch": subject.epoch,
        "classes": subject.classes and list(subject.classes),
        "precision": "bfloat16" if args.bfloat16 else "float32",
        "scored_with": {name: plain_values(subject.config)[name] for name in SCORING},
        "config": trained_with and plain_values(trained_with),
    }
    results = Results(file, head, environment(world.device), writes=world.is_main)
    if world.is_main:
        results.take_over(benchmarks, overwrite=args.overwrite, replace=args.output is None)
    results.share(world.broadcast(results.benchmarks), benchmarks)
    return results


def describe(benchmark: Benchmark, cell: Subset) -> str:
    return " ".join(map(str, filter(None, (benchmark.name, cell.part, cell.severity))))


def check(predictions: Predictions, benchmark: Benchmark, cell: Subset) -> None:
    """Raises UserError unless there is one finite prediction for each image of the cell."""
    if len(predictions.label_I) != cell.images:
        raise UserError(f"{describe(benchmark, cell)}: {len(predictions.label_I)} images instead of {cell.images}")
    if not predictions.confidence_I.isfinite().all():
        raise UserError(f"{describe(benchmark, cell)}: the network gives values that are not finite numbers")


def one_by_one(args: argparse.Namespace) -> Iterator[argparse.Namespace]:
    """The arguments of each checkpoint, where several files or seeds were named."""
    for file in dict.fromkeys(args.checkpoint or args.weights or [None]):
        for seed in dict.fromkeys(args.seed or [None]):
            one = {"seed": seed, "checkpoint": args.checkpoint and file, "weights": args.weights and file}
            yield argparse.Namespace(**vars(args) | one)


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
    content, sha256 = load_hashed(file)
    shape = {"model": dict, "classes": [str], "config": dict, "epoch": int}
    if not has_shape(content, shape) or not _is_state_dict(content["model"]) or content["epoch"] < 0:
        raise UserError(f"{file}: is no model.pt of main.py; score a plain state dict with --model NAME --weights FILE")
    said = {field: (str(file), value) for field, value in content["config"].items()}
    trained_with = load_config(None, said)
    may_differ = {field.name for field in dataclasses.fields(Config) if field.metadata["may_change"]} | {*SCORING}
    config = load_config(None, said | {field: value for field, value in overrides.items() if field in may_differ})
    by_name = args.checkpoint or args.name
    if by_name and args.load_conf and (asked.model, asked.dataset) != (config.model, config.dataset):
        raise UserError(
            f"{file}: is a {config.model} for {config.dataset}, but {args.load_conf} asks for "
            f"a {asked.model} for {asked.dataset}; leave out --load_conf, or name another checkpoint"
        )
    classes = tuple(content["classes"])
    look_only = "dataroot" not in overrides and not stays_below(config.dataroot)
    return Subject(
        file, sha256, content["model"], config, len(classes), classes, trained_with, content["epoch"], look_only
    )


def plain_state_dict(args: argparse.Namespace) -> Subject:
    """Anybody's state dict, also nested in a training checkpoint or saved from a wrapped module. Raises UserError."""
    said = overrides_from(args) | {"model": ("--model", args.model)}
    families = {named(name).family for name in args.benchmarks if name != "all"} - {None}
    conf = args.load_conf
    if conf is None and "dataset" not in said:
        if len(families) != 1:
            raise UserError(f"{args.weights}: say what data it is for, with --load_conf or --set dataset=NAME")
        said = {"dataset": ("--benchmarks", families.pop())} | said
    if conf is None:
        said = {"crop_padding": ("--benchmarks", 0)} | said  # for training; not every data set can have it
    config = load_config(conf, said)
    content, sha256 = load_hashed(args.weights)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not _is_state_dict(content):
        raise UserError(f"{args.weights}: holds no state dict (names with tensors)")
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in content.items()}
    return Subject(args.weights, sha256, weights, config, outputs_of(weights, config))


def outputs_of(weights: dict[str, Tensor], config: Config) -> int:
    """How many classes the weights are for: the size of the bias that grows with them, or 10 where it is missing."""
    with torch.device("meta"):
        two, three = (build_model(config.model, classes, **config.model_options()).state_dict() for classes in (2, 3))
    bias = next(name for name in two if two[name].shape != three[name].shape and two[name].ndim == 1)
    return len(weights[bias]) if bias in weights and weights[bias].ndim == 1 else 10


def _is_state_dict(content: Any) -> bool:
    """Whether it holds tensors by name, and such as have their numbers with them."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items())
        and not any(v.is_meta or v.layout != torch.strided or v.is_complex() for v in content.values())
    )


def check_weights(model: nn.Module, subject: Subject) -> None:
    """Raises UserError that names the first tensors that do not fit."""
    own, weights = model.state_dict(), subject.weights
    problems = [f"{name} is missing" for name in own if name not in weights]
    problems += [f"{printable(name, 80)} is unknown" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 2} more" if len(problems) > 2 else ""
        raise UserError(
            f"{subject.file}: does not fit {subject.config.model} with {subject.num_classes} classes: "
            f"{'; '.join(problems[:2])}{more}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="evaluate.py", description=__doc__)
    add_arguments(parser, several_seeds=True)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", metavar="FILE", help="a model.pt, wherever it lies, or several")
    add("--model", metavar="NAME", help="network of the --weights")
    add("--weights", type=Path, nargs="+", metavar="FILE", help="a plain state dict, or several")
    names = ", ".join(entry.name for entry in BENCHMARKS)
    add("--benchmarks", nargs="+", default=["clean"], metavar="NAME", help=f"{names}, or all that fit (default: clean)")
    add("--amp", action="store_true", dest="bfloat16", help="score in bfloat16 (default: float32); results say so")
    add("--batch_size", type=int, metavar="B", help=f"images in a forward pass (default: {BATCH})")
    add("--format", choices=FORMATS, help="of what is printed (default: table; of --compare: markdown)")
    add("--output", type=Path, metavar="FILE", help="results.json (default: beside the checkpoint)")
    add("--overwrite", action="store_true", help="score anew what results.json holds already")
    add("--compare", nargs="+", type=Path, metavar="RESULTS", help="score nothing: a table of these results.json")
    add("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    several = max(len(args.checkpoint or args.weights or [1]), len(args.seed or [1])) > 1
    if args.output and several:
        parser.error("--output: names one file, and several checkpoints are scored")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no directory {args.output.parent}")
    if args.output and (args.output.suffix != ".json" or args.output.is_dir()):
        parser.error(f"--output {args.output}: name a file that ends in .json")
    if args.compare and (args.checkpoint or args.weights or args.load_conf):
        parser.error("--compare: scores nothing; leave out --checkpoint, --weights and --load_conf")
    if (args.model is None) != (args.weights is None):
        parser.error("--model and --weights go together")
    if args.weights and args.checkpoint:
        parser.error("--weights and --checkpoint exclude each other")
    if len(args.seed or [1]) > 1 and (args.checkpoint or args.weights or args.name):
        parser.error("--seed: several seeds find runs by their conf; leave out --checkpoint, --weights and --name")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error(f"--batch_size: {args.batch_size} must be at least 1")
    if "all" in args.benchmarks and len(args.benchmarks) > 1:
        parser.error("--benchmarks: 'all' stands alone")
    return args


if __name__ == "__main__":
    exit_with_status(main)
