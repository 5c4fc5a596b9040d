"""What a GPU costs and whether its results are exact: one command, a few minutes.

    python benchmarks/accelerator.py                                    # 8 minutes -> results/speed/<card>.json
    python benchmarks/accelerator.py --dataroot DIR                     # with real images, and training on them
    python benchmarks/accelerator.py --dataroot DIR --parts training    # continue the training
    python benchmarks/accelerator.py --device cpu --minutes 2           # the same in small sizes -> logs/results

exactness   every operation, level and sign compared with Pillow; the tests marked cuda: no step waits for the device,
            equal runs give equal bits, a resumed run equals the uninterrupted one, float16, NCCL, compile
step        training steps with policies, compared with the same steps on ready tensors
operations  two operations per copy, compared with torchvision on the same device and Pillow on one core
epoch       an epoch of 50,000 images; what `deterministic` costs and `compile` gains
training    experiments.py controls, seed 0, for the remaining time; the next call continues it

Each part runs in its own process and is stopped when its time is up; a failure in one does not affect the others.
Every result is written at once. Measuring a part again replaces its results in the file.

DIR holds train/<class>/* and test/<class>/*, or CIFAR-10 as it is distributed.

Shape suffixes: N images of a batch, M copies of each, B = N * M.
"""

import argparse
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import augment
from cost import cost
from exactness import compare_with_pillow, is_cifar10, run_marked_tests
from measuring import (
    ROOT,
    Report,
    Spread,
    attempt,
    describe_machine,
    host_waits,
    machine,
    ratios,
    report_failure,
    take_turns,
    timed,
)
from parts.accelerator_tables import epoch_table, exactness_table, operations_table, step_table, training_table
from step import Steps, timed_steps

import main as training
from analysis.specs import PlannedRun, load_experiment, runs_of
from augmentations import apply
from config import Config, load_config
from datasets.loading import statistics
from datasets.splits import ResidentSplit
from evaluation.results import read_results
from evaluation.text_table import Table, render
from training.distributed import World, join
from training.exit import exit_with_status
from training.signals import signals_raise
from utils import (
    CommandLine,
    UserError,
    choose_kernels,
    duration,
    first_line,
    keyed_generator,
    write_text,
)

SECONDS_TO_STOP = 15  # for a part to save its work once its time is up; reserved at the end
SECONDS_BETWEEN_LOOKS = 0.5


class Size(NamedTuple):
    """How much is measured.

    steps, epoch: (conf, M, N). copies: side of the images -> N. product: side of the matrices.
    """

    steps: tuple[tuple[str, int, int], ...]
    changes: dict[str, Any]
    copies: dict[int, int]
    M: int
    epoch_images: int
    repeats: int
    steps_per_turn: int
    product: int
    epoch: tuple[str, int, int]
    experiment: str


WRN40, WRN28, RESNET50 = "cifar10/wresnet40x2_cifar10", "cifar10/wresnet28x10_cifar10", "imagenet/resnet50"
ON_CUDA = Size(
    steps=((WRN40, 8, 128), (WRN28, 8, 128), *((WRN40, M, 128) for M in (1, 2, 4, 16)), (RESNET50, 8, 32)),
    changes={"amp": True},
    copies={32: 128, 224: 32},
    M=8,
    epoch=(WRN28, 8, 128),
    epoch_images=50_000,
    repeats=7,
    steps_per_turn=5,
    product=8192,
    experiment="small",
)
ON_CPU = Size(
    steps=((WRN40, 2, 8), (RESNET50, 2, 4)),
    changes={"model": "wresnet10_1", "image_size": 32},
    copies={32: 8, 224: 2},
    M=2,
    epoch=(WRN40, 2, 8),
    epoch_images=40,
    repeats=2,
    steps_per_turn=1,
    product=512,
    experiment="tiny",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the parts need from the command line."""

    device: str
    dataroot: Path | None
    results: Path
    logdir: Path

    @property
    def size(self) -> Size:
        return ON_CPU if torch.device(self.device).type == "cpu" else ON_CUDA

    def config(self, conf: str, M: int, N: int) -> Config:
        """A conf at M policies and N images, without micro-batches, at a learning rate that is stable on noise."""
        config = load_config(ROOT / "confs" / f"{conf}.yaml", {})
        return dataclasses.replace(config, M=M, batch_size=N, accumulate=1, lr=0.01, **self.size.changes)


def main() -> None:
    began, args = time.monotonic(), parse_arguments()
    try:
        with join("cuda:0" if args.device == "cuda" else args.device) as world:
            device = world.device
    except UserError as error:
        raise UserError(f"{error}; --device cpu runs everything in small sizes") from None
    if world.in_group:
        raise UserError("accelerator.py measures one GPU from one process; start it without torchrun")
    here = machine(device)
    results = args.results or Path("logs" if device.type == "cpu" else "") / "results"
    settings = Settings(str(device), args.dataroot, results, args.logdir)
    parts = parts_to_run(args.parts, settings)
    file = ResultsFile(results / "speed", here)
    seconds = 60 * args.minutes - SECONDS_TO_STOP
    try:
        for part in parts:
            until = 1.0 if part == parts[-1] else PARTS[part].until
            run_part(part, settings, file, until=began + until * seconds, ends=began + seconds)
    except KeyboardInterrupt as stop:
        raise type(stop)(f"the results so far are in {file.path}") from None
    print("\n" + "\n\n".join(render(table, "markdown") for table in tables(file.content)))
    print(f"\n{describe_machine(here)}\nwritten to {file.path}")


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="benchmarks/accelerator.py", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda", help="cuda, cuda:1, ..., or cpu (default: %(default)s)")
    add("--minutes", type=minutes, default=8.0, help="for all parts (default: %(default)g)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all of them")
    add("--dataroot", type=Path, metavar="DIR", help="real images; the training part on a GPU needs them")
    add("--results", type=Path, metavar="DIR", help="default: ./results, or ./logs/results on the CPU")
    add("--logdir", type=Path, default=Path("logs"), metavar="DIR", help="of the training (default: ./%(default)s)")
    return parser.parse_args()


def minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0 and up to 600")
    return number


def parts_to_run(names: Sequence[str], settings: Settings) -> list[str]:
    """In their order. Raises UserError for images that cannot be trained on."""
    root = settings.dataroot
    if root is not None and not (is_cifar10(root) or (root / "train").is_dir()):
        raise UserError(f"--dataroot {root}: has neither train/<class>/* nor cifar-10-batches-py; name another folder")
    parts = [part for part in PARTS if part in names]
    if "training" in parts and root is None and settings.size is ON_CUDA:
        parts.remove("training")
        if not parts:
            raise UserError("--parts training: needs real images; add --dataroot DIR")
        print("training: skipped, it needs real images (--dataroot DIR)", flush=True)
    return parts


class ResultsFile:
    """The file of results, named after the device: rewritten atomically after each result.

    For each part it holds the date, the machine and the versions. Raises UserError if it cannot be read or written.
    """

    def __init__(self, folder: Path, here: dict[str, Any]):
        name = here["processor"] if here["device"].startswith("cpu") else here["device"]
        self.path = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
        self.content, self._here = {"device": name, "parts": {}}, here
        try:
            if self.path.exists():
                self.content["parts"] = dict(json.loads(self.path.read_text(encoding="utf-8"))["parts"])
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path}: cannot be used ({first_line(error)}); move it away") from None
        self._write()

    def begin(self, part: str) -> None:
        date = time.strftime("%Y-%m-%d")
        self.content["parts"][part] = {"date": date, "machine": self._here, "whole": False, "results": {}}

    def add(self, part: str, name: str, measured: dict[str, Any]) -> None:
        self.content["parts"][part]["results"][name] = measured
        self._write()

    def end(self, part: str, *, whole: bool) -> None:
        self.content["parts"][part]["whole"] = whole
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def run_part(part: str, settings: Settings, file: ResultsFile, until: float, ends: float) -> None:
    """Run a part in its own process, and stop it in time. until, ends: its end and that of the call (monotonic)."""
    if time.monotonic() >= until:
        print(f"{part}: not started, no time is left", flush=True)
        return
    context = multiprocessing.get_context("spawn")  # a forked process could not use CUDA
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=run_in_process, args=(part, settings, sending), name=part)
    deadline, stopped = until, False
    file.begin(part)
    process.start()
    sending.close()
    try:
        while True:
            if receiving.poll(max(0.0, deadline - time.monotonic())):
                name, words, measured = receiving.recv()  # EOFError once the process has ended
                file.add(part, name, measured)
                if words:
                    print(f"{duration(max(0.0, ends - time.monotonic()))} left  {part}: {name}: {words}", flush=True)
            elif stopped:
                break
            else:
                process.terminate()
                deadline, stopped = time.monotonic() + SECONDS_TO_STOP, True
    except EOFError:
        pass
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join(0 if stopped else SECONDS_TO_STOP)
        process.kill()
    process.join()
    if process.exitcode not in (0, 1) and not stopped:
        file.add(part, part, {"failed": f"ended with status {process.exitcode}"})
    file.end(part, whole=not stopped and process.exitcode == 0)
    if stopped:
        print(f"{part}: stopped, its time is up", flush=True)
    elif process.exitcode:
        print(f"{part}: ended with status {process.exitcode}", flush=True)


def run_in_process(part: str, settings: Settings, sending: Connection) -> None:
    def report(name: str, words: str, **measured: Any) -> None:
        sending.send((name, words, measured))

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which stops this process
    with signals_raise():
        try:
            with join(settings.device) as world:
                PARTS[part].run(settings, world, report)
        except (KeyboardInterrupt, BrokenPipeError):  # the time is up, or the parent was killed
            sys.exit(1)
        except Exception as error:
            report_failure(report, part, error)
            sys.exit(1)


# The parts


def exactness(settings: Settings, world: World, report: Report) -> None:
    for side in settings.size.copies:
        compare = functools.partial(compare_with_pillow, settings.dataroot, side, world.device)
        attempt(report, f"Pillow, {side}x{side}", compare)
    run_marked_tests(settings.device, report)


def step(settings: Settings, world: World, report: Report) -> None:
    attempt(report, "matrix product", functools.partial(matrix_product, settings.size, world.device))
    for conf, M, N in settings.size.steps:
        config = settings.config(conf, M, N)
        attempt(report, f"{conf}, M = {M}, N = {N}", functools.partial(one_step, config, settings.size, world))


def matrix_product(size: Size, device: torch.device) -> tuple[str, dict[str, Any]]:
    """Rate of a large matrix product in the precision of the steps: about the most that the device reaches."""
    n, dtype = size.product, torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = 10 if device.type == "cuda" else 1
    turns = take_turns({"": lambda: timed(lambda: [a @ b for _ in range(times)], device)}, size.repeats)[""]
    rate = Spread.of(turns).per_second(2 * n**3 * times)
    measured = {"side": n, "dtype": str(dtype).removeprefix("torch."), "flops_per_second": rate.median}
    return f"{rate.median / 1e12:,.3g} TFLOP/s", measured


def one_step(config: Config, size: Size, world: World) -> tuple[str, dict[str, Any]]:
    steps, B, memory = Steps(config, world), config.M * config.batch_size, {}
    inputs = {"policies": steps.with_policies, "bare": steps.with_ready_inputs}
    ways = {name: functools.partial(timed_steps, steps, way, size.steps_per_turn) for name, way in inputs.items()}
    turns = take_turns(ways, size.repeats)
    seconds = {name: [took / size.steps_per_turn for took in taken] for name, taken in turns.items()}
    waits = host_waits(lambda: [steps.take(steps.with_policies()) for _ in range(size.steps_per_turn)], world.device)
    if world.device.type == "cuda":
        for name in ("bare", "policies"):
            torch.cuda.reset_peak_memory_stats(world.device)
            ways[name]()
            memory[name] = torch.cuda.max_memory_allocated(world.device)
            vars(steps).pop("ready_inputs", None)  # of bare steps
    median, ratio = Spread.of(seconds["policies"]).median, ratios(seconds["policies"], seconds["bare"])
    measured = {
        "model": config.model,
        "M": config.M,
        "N": config.batch_size,
        "side": config.image_size,
        "precision": config.amp_dtype if config.amp else "float32",
        "seconds": seconds,
        "ratio": ratio,
        "copies_per_second": B / median,
        "flops_per_second": B * cost(config).flops_per_image / median,
        "waits": None if waits is None else waits / size.steps_per_turn,
        "memory": memory,
    }
    return f"{1000 * median:,.1f} ms, {ratio.describe('.3f')} of a bare step", measured


def operations(settings: Settings, world: World, report: Report) -> None:
    for side, N in settings.size.copies.items():
        work = augment.prepare(augment.build_config(side, settings.size.M), side, N, world.device)
        ways = augment.operations(work)
        others = [way for way in ways if way not in (augment.OURS, augment.PILLOW)]
        for way in [*others, *([augment.GRAPH] if world.device.type == "cuda" else [])]:
            attempt(report, f"{side}x{side}, {way}", functools.partial(rates, work, side, way, settings.size.repeats))


def rates(work: augment.Work, side: int, way: str, repeats: int) -> tuple[str, dict[str, Any]]:
    """Copies per second of this way, the batched operations and Pillow."""
    ways = augment.operations(work)
    if way == augment.GRAPH:
        ways[way] = augment.as_graph(work.copies_BCHW, work.plan)
        if not torch.equal(ways[way](), apply(work.copies_BCHW, work.plan)):
            raise RuntimeError("the graph's values differ from those without one")
    ways = {name: ways[name] for name in (augment.OURS, augment.PILLOW, way)}
    copies = len(work.copies_BCHW)
    rows = augment.measure(side, "operations", ways, copies, repeats, work.copies_BCHW.device)
    measured = {row.way: {"copies_per_second": row.images_per_second, "to_pillow": row.to_reference} for row in rows}
    words = "; ".join(f"{row.way} {row.images_per_second.median:,.0f}/s" for row in rows)
    return words, {"side": side, "copies": copies, "ways": measured}


def epoch(settings: Settings, world: World, report: Report) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `deterministic`; read once, at the first product
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # so that compiling takes as long as the first time
    config = settings.config(*settings.size.epoch)
    attempt(report, "epoch", functools.partial(one_epoch, config, settings.size.epoch_images, world))
    for setting in ("deterministic", "compile"):
        attempt(report, setting, functools.partial(compare_with_plain, config, setting, settings.size, world))


class NoManager:
    """Replaces the RunManager of a run: nothing is saved or logged."""

    def after_step(self) -> None:
        pass

    def after_interval(self, record: dict[str, Any]) -> None:
        pass


def one_epoch(config: Config, images: int, world: World) -> tuple[str, dict[str, Any]]:
    steps, draws = Steps(config, world), keyed_generator("epoch")
    timed_steps(steps, steps.with_policies, 3)
    shape = images, 3, config.image_size, config.image_size
    images_NCHW = torch.randint(256, shape, dtype=torch.uint8, generator=draws).to(world.device)
    split = ResidentSplit(images_NCHW, torch.randint(10, (images,), generator=draws))
    seconds = timed(lambda: training.train_one_epoch(steps.state, split, NoManager()), world.device)
    copies = images // config.batch_size * config.batch_size * config.M
    measured = {"model": config.model, "M": config.M, "N": config.batch_size, "images": images, "seconds": seconds}
    return f"{seconds:,.1f} s", measured | {"copies_per_second": copies / seconds}


def compare_with_plain(config: Config, setting: str, size: Size, world: World) -> tuple[str, dict[str, Any]]:
    """Steps with a setting on, relative to off; the first step, which may compile, is timed separately."""
    configs = {"plain": config, setting: dataclasses.replace(config, **{setting: True})}
    steps = {name: Steps(own, world) for name, own in configs.items()}

    def turn(name: str) -> float:
        choose_kernels(world.device, configs[name].deterministic, config.tf32)
        return timed_steps(steps[name], steps[name].with_policies, size.steps_per_turn)

    first = timed(lambda: steps[setting].take(steps[setting].with_policies()), world.device)
    try:
        seconds = take_turns({name: functools.partial(turn, name) for name in configs}, size.repeats)
    finally:
        choose_kernels(world.device, False, config.tf32)
    ratio = ratios(seconds[setting], seconds["plain"])
    measured = {"model": config.model, "M": config.M, "N": config.batch_size, "ratio": ratio, "first": first}
    words = f"{ratio.describe('.3f')} of a plain step; the first one {first:,.1f} s"
    return words, measured | {"steps": size.steps_per_turn, "seconds": seconds}


def train(settings: Settings, world: World, report: Report) -> None:
    size, device = settings.size, world.device
    changes = data_settings(settings.dataroot)
    words = ["controls", "--size", size.experiment, "--seeds", "0", "--jobs", "2" if device.type == "cuda" else "1"]
    words += ["--logdir", str(settings.logdir), "--results", str(settings.results)]
    words += ["--set", *changes] if changes else []
    runs = list(runs_of(load_experiment("controls", size.experiment, [0], changes), settings.logdir))
    process = subprocess.Popen([sys.executable, str(ROOT / "experiments.py"), *words], env=environment_for(device))
    reported: set[str] = set()
    parent = multiprocessing.parent_process()
    try:
        while process.poll() is None and parent.is_alive():
            report_runs(runs, reported, report)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    finally:
        process.terminate()
        process.wait()
        report_runs(runs, reported, report, unfinished=True)
    if process.returncode:
        raise UserError(f"experiments.py ended with status {process.returncode}")


def report_runs(runs: Sequence[PlannedRun], reported: set[str], report: Report, *, unfinished: bool = False) -> None:
    """Report the runs that have been scored since the last call and, with `unfinished`, the state of the others."""
    for one in (one for one in runs if one.arm not in reported):
        if one.is_scored():
            (cell,) = read_results(one.directory)["benchmarks"]["clean"]["cells"]
            reported.add(one.arm)
            measured = {"dataset": one.config.dataset, "error": cell["error"], "images": cell["images"]}
            report(one.arm, f"test error {cell['error']:.2%}", state="done", **measured)
        elif unfinished:
            report(one.arm, one.state(), state=one.state())


def data_settings(dataroot: Path | None) -> list[str]:
    """Settings that train a CIFAR-10 conf on these images."""
    if dataroot is None:
        return []
    place = f"dataroot={json.dumps(str(dataroot.resolve()))}"
    if is_cifar10(dataroot):
        return [place]
    mean, std = map(list, statistics("cifar10"))
    return [place, "dataset=folder", "image_size=32", f"mean={mean}", f"std={std}", "workers=8"]


def environment_for(device: torch.device) -> dict[str, str]:
    """The environment of a process that uses this device only."""
    if device.type == "cpu":
        return os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    index, visible = device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    return os.environ | {"CUDA_VISIBLE_DEVICES": visible.split(",")[index] if visible else str(index)}


def tables(content: dict[str, Any]) -> list[Table]:
    """The tables of a file of results, one per part in it."""
    found = []
    for part in (name for name in PARTS if name in content["parts"]):
        whole, results = (content["parts"][part][what] for what in ("whole", "results"))
        table = PARTS[part].table({k: one for k, one in results.items() if "failed" not in one or "outcome" in one})
        failed = [f"{name}: failed ({one['failed']})" for name, one in results.items() if "failed" in one]
        cut = [] if whole else ["Cut short: not everything was measured."]
        found.append(table._replace(notes=[*table.notes, *failed, *cut]))
    return found


class Part(NamedTuple):
    """until: the share of the time after which the part is stopped, unless it is the last. table: of its results."""

    until: float
    run: Callable[[Settings, World, Report], None]
    table: Callable[[dict[str, Any]], Table]


PARTS = {
    "exactness": Part(0.35, exactness, exactness_table),
    "step": Part(0.5, step, step_table),
    "operations": Part(0.6, operations, operations_table),
    "epoch": Part(0.92, epoch, epoch_table),
    "training": Part(1.0, train, training_table),
}


if __name__ == "__main__":
    exit_with_status(main)
