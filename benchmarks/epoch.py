"""How long an epoch and its parts take, and how long the commands take to start.

    python benchmarks/epoch.py                                                # confs/demo.yaml, on the CPU too
    python benchmarks/epoch.py --load_conf confs/cifar10/wresnet40x2_cifar10.yaml --amp --epochs 4
    python benchmarks/epoch.py --load_conf confs/imagenet/resnet50.yaml --dataroot DIR --amp --set accumulate=16
    torchrun --nproc_per_node 8 benchmarks/epoch.py --load_conf ... --amp

main.train runs twice, for a few epochs each, in a temporary directory. In the first run the clock is read only at the
end of an epoch: these are the seconds per epoch. In the second it is also read around the functions of every part; on
CUDA each reading waits for the device, so that this run is slower and gives shares only. The first epoch of each run
warms up and is not counted.

What a part's function calls belongs to that part: images that are read for scoring count as scoring. "other" is the
training loop itself. The overhead is that of controller, logging and checkpoints.
"""

import argparse
import contextlib
import functools
import inspect
import io
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from measuring import ROOT, Spread, count, in_turn, parse, parser, publish, ratios, wait_for

import main as training
from config import DEFAULT_CONF, Config, add_setting_arguments, load_config, overrides_from, plain_values
from dataloader import Normalise, TrainLoader
from datasets.splits import ResidentSplit, StreamedSplit
from evaluation.text_table import Table
from policies.sources import PolicySource
from training import manager
from training.distributed import World, join
from training.exit import exit_with_status
from training.log import Progress, RunLog
from utils import UserError

# The functions of each part: (module or class, name).
PARTS: dict[str, list[tuple[Any, str]]] = {
    "data": [(ResidentSplit, "batches"), (StreamedSplit, "batches")],
    "augmentation": [(TrainLoader, "draw"), (TrainLoader, "augment"), (Normalise, "__call__")],
    "model": [(training, "learn"), (training, "descend")],
    "controller": [(PolicySource, "resample"), (PolicySource, "observe"), (PolicySource, "update")],
    "logging": [
        *((RunLog, name) for name in ("interval", "epoch", "policy_images", "positions")),
        *((Progress, name) for name in ("step", "say")),
        (TrainLoader, "preview"),
    ],
    "checkpoints": [(manager, "save_model"), (manager.RunManager, "save")],
    "scoring": [(training, "score_for_the_log")],
}
OVERHEAD = ("controller", "logging", "checkpoints")
STARTS = {
    "python main.py --help": ["main.py", "--help"],
    "python evaluate.py --help": ["evaluate.py", "--help"],
    "import torch, torchvision": ["-c", "import torch, torchvision"],
    "import torch": ["-c", "import torch"],
}


class Epoch(NamedTuple):
    """Seconds of an epoch, and of its parts where they were measured."""

    seconds: float
    parts: dict[str, float]


def main() -> None:
    args = parse_arguments()
    config = load_config(args.load_conf or DEFAULT_CONF, overrides_from(args))
    if not 2 <= args.epochs <= config.epochs:
        raise UserError(
            f"--epochs: {args.epochs} must be at least 2, since the first is not counted, and at most the conf's "
            f"{config.epochs}"
        )
    with join(args.device) as world:
        alone = [epoch.seconds for epoch in run(config, args, world, {})]
        epochs = run(config, args, world, PARTS)
        if world.is_main:
            starts = {} if args.no_starts else measure_starts(args.repeats)
            tables = [table_of_parts(alone, epochs, args), *([table_of_starts(starts)] if starts else [])]
            medians = f"{len(alone)} epochs" + (f", {args.repeats} starts" if starts else "")
            publish(args, tables, as_measured(config, alone, epochs, starts), medians)


def parse_arguments() -> argparse.Namespace:
    arguments = parser(__doc__)
    add_setting_arguments(arguments)
    add = arguments.add_argument
    add("--amp", action="store_true", help="mixed precision")
    add("--epochs", type=count, default=3, help="of each run, with the first (default: %(default)s)")
    add("--no_starts", action="store_true", help="do not measure how long the commands take to start")
    return parse(arguments)


def run(config: Config, args: argparse.Namespace, world: World, parts: dict[str, list[tuple[Any, str]]]) -> list[Epoch]:
    """Train for a few epochs without output; returns all but the first."""
    clock = Clock(world.device)
    with tempfile.TemporaryDirectory() as folder, clock.timing(parts), contextlib.redirect_stdout(io.StringIO()):
        said = dict.fromkeys(("resume", "resume_elastic", "overwrite"), False)
        said |= {"logdir": Path(folder), "name": "run", "stop_epoch": args.epochs}
        try:
            training.train(config, argparse.Namespace(**vars(args) | said), world)
        except KeyboardInterrupt as stop:
            raise type(stop) from None  # without main's message: this run is not kept
    return clock.epochs[1 : args.epochs]


class Clock:
    """Seconds of every epoch of a run and of the parts that are timed."""

    def __init__(self, device: torch.device):
        self.device, self.epochs = device, []
        self._began, self._parts, self._running = time.perf_counter(), Counter(), False

    @contextlib.contextmanager
    def timing(self, parts: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """Replace the functions of these parts by timed ones."""
        with contextlib.ExitStack() as replaced:
            for part, functions in parts.items():
                for holder, name in functions:
                    timed = self._timed(part, getattr(holder, name))
                    replaced.enter_context(mock.patch.object(holder, name, timed))
            say = self._ending_an_epoch(Progress.say)
            replaced.enter_context(mock.patch.object(Progress, "say", say))
            yield

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            with self._part(part):
                return function(*arguments, **named)

        @functools.wraps(function)
        def iterate(*arguments: Any, **named: Any) -> Iterator[Any]:
            items = function(*arguments, **named)
            while True:
                with self._part(part):
                    item = next(items, items)
                if item is items:
                    return
                yield item

        return iterate if inspect.isgeneratorfunction(function) else call

    @contextlib.contextmanager
    def _part(self, part: str) -> Iterator[None]:
        """Count the time of the block for this part, unless it is inside another part."""
        if self._running:
            yield
            return
        wait_for(self.device)
        started, self._running = time.perf_counter(), True
        try:
            yield
            wait_for(self.device)
        finally:
            self._parts[part] += time.perf_counter() - started
            self._running = False

    def _ending_an_epoch(self, say: Callable[..., None]) -> Callable[..., None]:
        """main prints the line of an epoch at its end."""

        @functools.wraps(say)
        def call(*arguments: Any) -> None:
            say(*arguments)
            now = time.perf_counter()
            self.epochs.append(Epoch(now - self._began, dict(self._parts)))
            self._began, self._parts = now, Counter()

        return call


def measure_starts(repeats: int) -> dict[str, list[float]]:
    """Seconds of each command in a new process, in turn."""

    def start(words: list[str]) -> None:
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    return in_turn({name: functools.partial(start, words) for name, words in STARTS.items()}, repeats)


def parts_of(epochs: list[Epoch]) -> dict[str, list[float]]:
    """Seconds of each part by epoch, and of the rest."""
    parts = {part: [epoch.parts.get(part, 0.0) for epoch in epochs] for part in PARTS}
    return parts | {"other": [epoch.seconds - sum(epoch.parts.values()) for epoch in epochs]}


def overhead(epochs: list[Epoch]) -> float:
    """Share of controller, logging and checkpoints in the epochs without scoring."""
    parts, seconds = parts_of(epochs), sum(epoch.seconds for epoch in epochs)
    return sum(sum(parts[part]) for part in OVERHEAD) / (seconds - sum(parts["scoring"]))


def table_of_parts(alone: list[float], epochs: list[Epoch], args: argparse.Namespace) -> Table:
    seconds = [epoch.seconds for epoch in epochs]
    rows = [
        [part, Spread.of(taken).describe(".3f"), f"{100 * sum(taken) / sum(seconds):.1f}"]
        for part, taken in (parts_of(epochs) | {"all": seconds}).items()
    ]
    notes = [
        f"An epoch takes {Spread.of(alone).describe('.3f')} s when its parts are not measured.",
        f"Overhead of {', '.join(OVERHEAD)}: {overhead(epochs):.1%} of an epoch without scoring.",
    ]
    conf = (args.load_conf or DEFAULT_CONF).stem
    return Table(f"An epoch of {conf}, median (lowest to highest)", ["part", "seconds", "% of all"], rows, notes)


def table_of_starts(starts: dict[str, list[float]]) -> Table:
    rows = [
        [name, Spread.of(seconds).describe(".2f"), ratios(seconds, starts["import torch"]).describe(".2f")]
        for name, seconds in starts.items()
    ]
    return Table("Starting, median (lowest to highest)", ["", "seconds", "/ import torch"], rows)


def as_measured(
    config: Config, alone: list[float], epochs: list[Epoch], starts: dict[str, list[float]]
) -> dict[str, Any]:
    return {
        "settings": plain_values(config),
        "seconds": alone,
        "seconds_by_parts": [epoch.seconds for epoch in epochs],
        "parts": parts_of(epochs),
        "overhead": overhead(epochs),
        "starts": starts,
    }


if __name__ == "__main__":
    exit_with_status(main)
