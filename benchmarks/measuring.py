"""Shared by the benchmarks: timing in turn, medians and spread, the machine, arguments, tables and JSON files."""

import argparse
import functools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from evaluation.text_table import Table, render  # noqa: E402 (found by the line above)
from utils import CommandLine, UserError, environment, first_line  # noqa: E402

CPU = torch.device("cpu")
LONGEST_REPORT = 3000  # characters of a failure that are kept

# Called with a name, a text to print (nothing where it is empty) and the measurements as keywords.
Report = Callable[..., None]


class Spread(NamedTuple):
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def per_second(self, things: int) -> "Spread":
        """The rate, where the values are the seconds that `things` took."""
        return Spread(things / self.median, things / self.high, things / self.low)

    def describe(self, form: str = ",.0f") -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def in_turn(cases: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """Seconds of every case, `repeats` times. They take turns, so that a slow moment of the machine affects all.

    Every other turn is in reverse order. One call of each beforehand is not counted.
    """
    return take_turns({name: functools.partial(timed, case, device) for name, case in cases.items()}, repeats)


def take_turns(cases: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """As `in_turn`, for cases that return their own seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        for name in list(cases)[:: 1 if repeat % 2 else -1]:
            took = cases[name]()
            if repeat >= 0:
                seconds[name].append(took)
    return seconds


def timed(case: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds until the device has finished what `case` started."""
    wait_for(device)
    started = time.perf_counter()
    case()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: list[float], to: list[float]) -> Spread:
    """Ratios of measurements of the same turn."""
    return Spread.of([a / b for a, b in zip(seconds, to, strict=True)])


def peak_memory(device: torch.device = CPU) -> float:
    """The peak of this process so far in bytes, of the GPU's memory or of main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # getrusage starts with the peak of the parent process
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def host_waits(case: Callable[[], Any], device: torch.device) -> int | None:
    """How often `case` makes the host wait for the GPU, as torch's synchronisation warnings count; None on the CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            case()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def report_failure(report: Report, name: str, error: Exception) -> None:
    """Report an error in a line, with the end of its traceback in the file."""
    reason = first_line(error)
    report(
        name, f"failed: {reason}", failed=reason, report="".join(traceback.format_exception(error))[-LONGEST_REPORT:]
    )


def attempt(report: Report, name: str, measure: Callable[[], tuple[str, dict[str, Any]]]) -> None:
    """Report the measurement, or the error."""
    began = time.monotonic()
    try:
        words, measured = measure()
    except Exception as error:
        report_failure(report, name, error)
    else:
        report(name, words, **measured, took=round(time.monotonic() - began, 1))


def processor() -> str:
    """The name of the CPU, as far as the system reports it."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return named.group(1) if named else platform.processor() or platform.machine()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """What measurements depend on: versions, processor, and the GPU with its driver."""
    here = environment(device) | {"processor": processor(), "cores": cores()}
    del here["platform"]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gigabytes, capability = properties.total_memory / 1e9, f"{properties.major}.{properties.minor}"
        here |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver()}
        here |= {"gpu_memory_gb": round(gigabytes, 1), "capability": capability}
    return here


def describe_machine(here: Mapping[str, Any]) -> str:
    """The result of `machine` in a line."""
    device = here["processor"] if here["device"].startswith("cpu") else here["device"]
    names = {"torch": "torch", "torchvision": "torchvision", "pillow": "Pillow", "cuda": "CUDA", "driver": "driver"}
    versions = ", ".join(f"{words} {here[name]}" for name, words in names.items() if here.get(name))
    return f"{device}, {here['cores']} cores, {here['threads']} threads of torch; {versions}"


def driver() -> str | None:
    """Version of the GPU's driver from nvidia-smi, or None."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def count(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    return _whole_number(text, 1)


def count_or_none(text: str) -> int:
    """Argument type: a whole number of at least 0."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def parser(description: str) -> CommandLine:
    """A parser with the arguments of every benchmark: repeats, threads, device and output."""
    parser = CommandLine(prog=f"benchmarks/{Path(sys.argv[0]).name}", description=description)
    parser.add_argument("--repeats", type=count, default=5, help="measurements of each median (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of torch on the CPU (default: as torch chooses)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file (default: ./logs/benchmarks/<name>.json)")
    return parser


def parse(parser: CommandLine) -> argparse.Namespace:
    """Parse the arguments and set torch's threads. Raises UserError."""
    args = parser.parse_args()
    if args.threads and args.threads > 1024:
        raise UserError(f"--threads: {args.threads} is more than 1024")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.output = args.output or Path("logs") / "benchmarks" / f"{Path(sys.argv[0]).stem}.json"
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.open("a").close()
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written to ({error})") from None
    return args


def publish(
    args: argparse.Namespace, tables: list[Table], measured: dict[str, Any], medians_of: str | None = None
) -> None:
    """Write all measurements, the machine and the command to the JSON file; print the tables and the machine.

    medians_of: what is repeated, where it is not `args.repeats` measurements.
    """
    here = machine(torch.device(args.device))
    content = {"date": time.strftime("%Y-%m-%d"), "environment": here, "repeats": args.repeats, "measured": measured}
    args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(render(table) for table in tables))
    print(f"\n{describe_machine(here)}; medians of {medians_of or args.repeats}")
    print(f"written to {args.output}")
