"""Score checkpoints on test sets and robustness benchmarks; every reported number comes from here.

    python evaluate.py                                                  # the run that a plain `python main.py` made
    python evaluate.py --load_conf confs/cifar10/wresnet28x10_cifar10.yaml --logdir ./logs --seed 0 1 2
    python evaluate.py --checkpoint logs/demo_0 --benchmarks clean generated-c     # any run directory or model.pt
    python evaluate.py --checkpoint logs/demo_0 --ema                              # its averaged weights alone
    python evaluate.py --model wresnet40_2 --weights FILE --benchmarks cifar10-c   # a state dict of another program
    torchrun --nproc_per_node 8 evaluate.py ...                         # the same numbers from several processes
    python evaluate.py --compare logs/*/results.json                    # a table beside the published numbers
    python evaluate.py --list                                           # the benchmarks, and which are downloaded
    python evaluate.py --make-corruptions --checkpoint logs/demo_0      # corruptions of the run's test images

Without --checkpoint, a run is found by the arguments it was trained with. results.json is written beside the checkpoint
after every subset (a test set, or a corruption at a severity): an interrupted evaluation continues with the rest.
Averaged weights (the setting ema) have their own, results-ema.json.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before the imports, which take seconds

import argparse
import dataclasses
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from config import DEFAULT_CONF, Config, add_arguments, load_config, overrides_from, plain_values
from dataloader import Normalise
from datasets.download import Downloads, Missing
from evaluation.benchmarks import BENCHMARKS, Benchmark, EvalRequest, Subset, find_spec, fits
from evaluation.corruptions import CORRUPTIONS
from evaluation.generated import draw_corruptions
from evaluation.metrics import Predictions, is_below_chance, measure
from evaluation.plots import draw_plots
from evaluation.predict import BATCH, ImageProgress, predict
from evaluation.results import Results
from evaluation.tables import FORMATS, benchmark_table, compare, report
from evaluation.text_table import render
from evaluation.weights import SCORING, Classifier, load_classifiers
from training.distributed import World, join
from training.exit import exit_with_status
from training.lock import sole_writer
from utils import CommandLine, UserError, environment, first_line, warn


def main() -> None:
    args = parse_arguments()
    if args.compare:
        print(compare(args.compare, args.format or "markdown"))
    elif args.list:
        print(render(benchmark_table(data_settings(args)[0])))
    elif args.make_corruptions:
        print(make_corruptions(args))
    else:
        with join(args.device) as world:
            results = []
            for classifier in list(load_classifiers(args)):  # all are loaded before the first is scored
                file = results_file(classifier, args)
                with sole_writer(file, "name another file with --output") if world.is_main else nullcontext():
                    results.append(evaluate(classifier, args, world, file))
            if world.is_main:
                print(report(results, args.format or "table"))


def evaluate(classifier: Classifier, args: argparse.Namespace, world: World, file: Path) -> dict[str, Any]:
    """Score one checkpoint on the requested benchmarks; returns the content of its results.json, `file`, for them."""
    config, num_classes = classifier.config, classifier.num_classes
    model = classifier.build().to(world.device, memory_format=torch.channels_last)
    quiet = not world.is_main
    downloads = Downloads(args.data_url, not args.no_download, quiet, only_checkpoint=classifier.only_checkpoint)
    with world.main_process_first(config.fetches_data or args.benchmarks != ["clean"]):
        request = EvalRequest(config, classifier.classes, num_classes, world.device, downloads)
        benchmarks = open_benchmarks(args.benchmarks, request)
    world.require_equal("the images", lambda: [(benchmark.name, benchmark.fingerprint) for benchmark in benchmarks])

    results = start_results(classifier, args, benchmarks, world, file)
    normalise = Normalise(config, world.device)
    progress = ImageProgress(sum(s.images for b in benchmarks for s in results.unscored(b)), shown=world.is_main)
    options = {"batch": args.batch_size, "bfloat16": args.bfloat16, "progress": progress.update}
    try:
        for benchmark in benchmarks:
            unscored = results.unscored(benchmark)
            for subset in unscored:
                progress.begin(subset_name(benchmark, subset))
                started = time.perf_counter()
                predictions = predict(model, subset.open(), normalise, world, **options)
                seconds = time.perf_counter() - started
                check_predictions(predictions, benchmark, subset)
                scores = measure(benchmark.kind, predictions, num_classes, part=subset.part, frames=subset.frames)
                results.add(benchmark, subset, scores, seconds)
                if world.is_main and classifier.trained_with is None and is_below_chance(scores):
                    warn(
                        f"{subset_name(benchmark, subset)}: {scores['top1']:.2%} is far below chance; does the data "
                        "set have the weights' order of classes, and their mean and std (--set mean=... std=...)?"
                    )
            if world.is_main and (unscored or not any(results.plots.glob(f"{benchmark.name}_*.png"))):
                try:
                    draw_plots(results.plots, benchmark, results.of(benchmark), classifier.classes)
                except Exception as error:  # the scores, which are the work, are saved
                    warn(f"{results.plots}: plots of {benchmark.name} cannot be drawn ({first_line(error)})")
    except KeyboardInterrupt as stop:
        without = " without --overwrite" if args.overwrite else ""
        raise type(stop)(f"finished scores are saved; the same command{without} continues with the rest") from None
    finally:
        progress.close()
    return results.head | {"benchmarks": {benchmark.name: results.of(benchmark) for benchmark in benchmarks}}


def open_benchmarks(names: list[str], request: EvalRequest) -> list[Benchmark]:
    """The named benchmarks, checked. "all": those that fit the classifier and are available; others are skipped.

    Raises UserError for one that does not fit, is missing, or is damaged.
    """
    fitting = [spec for spec in BENCHMARKS if fits(spec, request)]
    if names == ["all"]:
        available = []
        for spec in fitting:
            try:
                available.append(spec.open(spec, request))
            except Missing as error:
                if not request.downloads.quiet:
                    warn(f"{spec.name} is skipped: {error}")
        if not available:
            raise UserError(f"--benchmarks all: none that fits is in {request.root} or can be downloaded")
        return available
    specs = [find_spec(name) for name in dict.fromkeys(names)]
    for spec in specs:
        if spec not in fitting:
            known = ", ".join(other.name for other in fitting)
            raise UserError(
                f"--benchmarks {spec.name}: needs a classifier for {spec.family}'s classes and image size, and this "
                f"one is for {request.num_classes} classes of {request.config.dataset}; those that fit are {known}"
            )
    return [spec.open(spec, request) for spec in specs]


def results_file(classifier: Classifier, args: argparse.Namespace) -> Path:
    name = "results.json" if classifier.file.name == "model.pt" else f"{classifier.file.name}.results.json"
    file = args.output or classifier.file.parent / name
    return file.with_name(f"{file.stem}-ema.json") if classifier.averaged else file


def start_results(
    classifier: Classifier, args: argparse.Namespace, benchmarks: list[Benchmark], world: World, file: Path
) -> Results:
    """Results in `file`, with the scores it already holds that are still valid."""
    trained_with = classifier.trained_with
    head = {
        "checkpoint": str(classifier.file),
        "sha256": classifier.sha256,
        "conf": args.load_conf and str(args.load_conf),
        "model": classifier.config.model,
        "seed": trained_with and trained_with.seed,
        "epoch": classifier.epoch,
        "classes": classifier.classes and list(classifier.classes),
        "precision": "bfloat16" if args.bfloat16 else "float32",
        "scored_with": {name: plain_values(classifier.config)[name] for name in SCORING}
        | ({"weights": "averaged"} if classifier.averaged else {}),
        "config": trained_with and plain_values(trained_with),
    }
    results = Results(file, head, environment(world.device), writes=world.is_main)
    if world.is_main:
        results.take_over(benchmarks, overwrite=args.overwrite, replace=args.output is None)
    results.share(world.broadcast(results.benchmarks), benchmarks)
    return results


def subset_name(benchmark: Benchmark, subset: Subset) -> str:
    return " ".join(map(str, filter(None, (benchmark.name, subset.part, subset.severity))))


def check_predictions(predictions: Predictions, benchmark: Benchmark, subset: Subset) -> None:
    """Raises UserError unless there is one finite prediction for each image of the subset."""
    name, images = subset_name(benchmark, subset), len(predictions.label_I)
    if images != subset.images:
        raise UserError(f"{name}: {images} images instead of {subset.images}")
    if not predictions.confidence_I.isfinite().all():
        raise UserError(f"{name}: the network gives values that are not finite numbers")


def data_settings(args: argparse.Namespace) -> tuple[Config, tuple[str, ...] | None, bool]:
    """For --list and --make-corruptions: settings, classes where a checkpoint names them, and `only_checkpoint`.

    A checkpoint's own seed does not count: runs that differ in the seed alone share their corruptions.
    """
    own_args = argparse.Namespace(**vars(args) | {"seed": args.seed and args.seed[0]})
    overrides = overrides_from(own_args)
    if not args.checkpoint:
        return load_config(args.load_conf or DEFAULT_CONF, overrides), None, False
    classifier = next(load_classifiers(args))
    seed = load_config(None, {field: value for field, value in overrides.items() if field == "seed"}).seed
    return dataclasses.replace(classifier.config, seed=seed), classifier.classes, classifier.only_checkpoint


def make_corruptions(args: argparse.Namespace) -> str:
    """Draw the corruptions of the test images of a conf or a run; returns a message with the next command."""
    config, classes, only_checkpoint = data_settings(args)
    if only_checkpoint:
        raise UserError(
            f"{config.dataroot}: nothing is written there because only the checkpoint names it\n"
            "if it is yours, name it with --dataroot DIR"
        )
    folder = draw_corruptions(config, Downloads(args.data_url, not args.no_download), classes, args.images)
    checkpoint = args.checkpoint[0] if args.checkpoint else "PATH"
    return (
        f"{folder}: {len(CORRUPTIONS)} corruptions at five severities, generated, not official\n"
        f"score a classifier on them: python evaluate.py --checkpoint {checkpoint} --benchmarks generated-c"
    )


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="evaluate.py", description=__doc__)
    add_arguments(parser, several_seeds=True)
    add = parser.add_argument
    add("--checkpoint", type=Path, nargs="+", metavar="PATH", help="run directories, or model.pt files")
    add("--model", metavar="NAME", help="network of the --weights")
    add("--weights", type=Path, nargs="+", metavar="FILE", help="state dicts of other programs")
    ema = "score the averaged weights, or not (default: both of a run that keeps an average; raw ones of --weights)"
    add("--ema", action=argparse.BooleanOptionalAction, help=ema)
    names = ", ".join(spec.name for spec in BENCHMARKS)
    add("--benchmarks", nargs="+", default=["clean"], metavar="NAME", help=f"{names}, or all that fit (default: clean)")
    add("--amp", action="store_true", dest="bfloat16", help="score in bfloat16 (default: float32); results record it")
    add("--batch_size", type=int, metavar="B", help=f"images in a forward pass (default: {BATCH})")
    add("--format", choices=FORMATS, help="of what is printed (default: table; of --compare: markdown)")
    add("--output", type=Path, metavar="FILE", help="results.json (default: beside the checkpoint)")
    add("--overwrite", action="store_true", help="score again what results.json already holds")
    add("--compare", nargs="+", type=Path, metavar="RESULTS", help="score nothing: a table of these results.json")
    add("--list", action="store_true", help="score nothing: list the benchmarks, and which are found in the data root")
    make = "score nothing: draw corruptions of the test images of a conf or a --checkpoint, below its data root"
    add("--make-corruptions", "--make_corruptions", action="store_true", help=make)
    add("--images", type=int, metavar="N", help="with --make-corruptions: N images, balanced over the classes")
    add("--local-rank", "--local_rank", help=argparse.SUPPRESS)  # torch.distributed.launch passes it
    args = parser.parse_args()
    seeds, output, makes_no_scores = len(args.seed or [1]), args.output, args.list or args.make_corruptions
    several = seeds > 1 or len(args.checkpoint or args.weights or [1]) > 1
    for is_wrong, message in (
        (output and several, "--output: names one file, and several checkpoints are scored"),
        (output and not output.parent.is_dir(), f"--output {output}: there is no directory {output and output.parent}"),
        (output and (output.suffix != ".json" or output.is_dir()), f"--output {output}: name a file ending in .json"),
        (args.compare and (args.checkpoint or args.weights or args.load_conf),
         "--compare: scores nothing; leave out --checkpoint, --weights and --load_conf"),
        (makes_no_scores and (several or args.weights), "--list and --make-corruptions take one --checkpoint or conf"),
        (args.images is not None and not args.make_corruptions, "--images: needs --make-corruptions"),
        (args.images is not None and args.images < 1, f"--images: {args.images} must be at least 1"),
        ((args.model is None) != (args.weights is None), "--model and --weights go together"),
        (args.weights and args.checkpoint, "--weights and --checkpoint exclude each other"),
        (seeds > 1 and (args.checkpoint or args.weights or args.name),
         "--seed: several seeds find runs by their conf; leave out --checkpoint, --weights and --name"),
        (args.batch_size is not None and args.batch_size < 1, f"--batch_size: {args.batch_size} must be at least 1"),
        ("all" in args.benchmarks and len(args.benchmarks) > 1, "--benchmarks: 'all' cannot be combined with others"),
    ):  # fmt: skip
        if is_wrong:
            parser.error(message)
    return args


if __name__ == "__main__":
    exit_with_status(main)
