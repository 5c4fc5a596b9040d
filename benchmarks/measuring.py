"""What the benchmarks share: cases measured in turn, medians with their spread, the machine, a table and a JSON file."""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from utils import Table, environment, render  # noqa: E402, found by the line above


class Spread(NamedTuple):
    """Of repeated measurements: the median, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def per_second(self, things: int) -> "Spread":
        """Of seconds that so many things took: how many a second."""
        return Spread(things / self.median, things / self.high, things / self.low)

    def in_words(self, form: str = ",.0f") -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def in_turn(
    cases: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = torch.device("cpu")
) -> dict[str, list[float]]:
    """Seconds of every case, `repeats` times. They take turns, so that whatever slows the machine meets all alike.

    One call of each beforehand does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        for name, case in cases.items():
            took = timed(case, device)
            if repeat >= 0:
                seconds[name].append(took)
    return seconds


def timed(case: Callable[[], Any], device: torch.device = torch.device("cpu")) -> float:
    """Seconds until what `case` started on the device is done."""
    wait_for(device)
    started = time.perf_counter()
    case()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ratio(seconds: list[float], to: list[float]) -> float:
    """Median of the ratios of measurements that were taken in turn."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


def peak_memory() -> float:
    """Of this process so far, in bytes of main memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def parser(description: str) -> argparse.ArgumentParser:
    """With the arguments that every benchmark has: repeats, threads, device and output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="medians are of so many")
    parser.add_argument("--threads", type=int, help="of torch, on the CPU; default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file; default: ./logs/benchmarks/<name>.json")
    return parser


def publish(name: str, args: argparse.Namespace, tables: list[Table], measured: dict[str, Any]) -> None:
    """Print the tables and the machine; write them, all measurements and the command to the JSON file."""
    machine = environment(torch.device(args.device))
    print("\n\n".join(render(table) for table in tables))
    versions = ", ".join(f"{package} {machine[package]}" for package in ("torch", "torchvision", "pillow"))
    print(f"\n{machine['device']}, {machine['threads']} threads of torch; {versions}; medians of {args.repeats}")
    output = args.output or Path("logs") / "benchmarks" / f"{name}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": machine, "repeats": args.repeats, "measured": measured}
    output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written to {output}")
