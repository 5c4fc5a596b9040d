"""What the benchmarks share: cases measured in turn, medians and spread, the machine, a table and a JSON file."""

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

from evaluation.text_table import Table, render  # noqa: E402, found by the line above
from utils import CommandLine, UserError, environment, first_line  # noqa: E402

CPU = torch.device("cpu")
LONGEST_REPORT = 3000  # characters of a failure that are kept

# Called with a name, words to print (none where it is empty), and what was measured, by name.
Report = Callable[..., None]


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

    def describe(self, form: str = ",.0f") -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def in_turn(cases: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device = CPU) -> dict[str, list[float]]:
    """Seconds of every case, `repeats` times. They take turns, so that whatever slows the machine meets all alike.

    Every other turn goes backwards, so that none always comes after the same one. One call of each beforehand does not
    count.
    """
    return take_turns({name: functools.partial(timed, case, device) for name, case in cases.items()}, repeats)


def take_turns(cases: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """As `in_turn`, of cases that say themselves how many seconds they took."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(-1, repeats):
        for name in list(cases)[:: 1 if repeat % 2 else -1]:
            took = cases[name]()
            if repeat >= 0:
                seconds[name].append(took)
    return seconds


def timed(case: Callable[[], Any], device: torch.device = CPU) -> float:
    """Seconds until what `case` started on the device is done."""
    wait_for(device)
    started = time.perf_counter()
    case()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratios(seconds: list[float], to: list[float]) -> Spread:
    """Of measurements that were taken in turn, one to the other."""
    return Spread.of([a / b for a, b in zip(seconds, to, strict=True)])


def peak_memory(device: torch.device = CPU) -> float:
    """Of this process so far, in bytes: of the GPU's memory, or of main memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # getrusage begins with the peak of the process that started this one
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def host_waits(case: Callable[[], Any], device: torch.device) -> int | None:
    """How often `case` makes the host wait for the GPU, as far as torch's own watch sees it; None on the CPU."""
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
    """In a line, and with the end of its traceback in the file."""
    reason = first_line(error)
    report(
        name, f"failed: {reason}", failed=reason, report="".join(traceback.format_exception(error))[-LONGEST_REPORT:]
    )


def attempt(report: Report, name: str, measure: Callable[[], tuple[str, dict[str, Any]]]) -> None:
    """Report what is measured, or why it cannot be."""
    began = time.monotonic()
    try:
        words, measured = measure()
    except Exception as error:
        report_failure(report, name, error)
    else:
        report(name, words, **measured, took=round(time.monotonic() - began, 1))


def processor() -> str:
    """Its maker's name for it, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    return named.group(1) if named else platform.processor() or platform.machine()


def cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(device: torch.device) -> dict[str, Any]:
    """What measurements on this device depend on: versions, processor, and the GPU with its driver."""
    here = environment(device) | {"processor": processor(), "cores": cores()}
    del here["platform"]  # nobody else's numbers depend on the name of this kernel
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gigabytes, capability = properties.total_memory / 1e9, f"{properties.major}.{properties.minor}"
        here |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver()}
        here |= {"gpu_memory_gb": round(gigabytes, 1), "capability": capability}
    return here


def describe(here: Mapping[str, Any]) -> str:
    """A `machine` in a line."""
    device = here["processor"] if here["device"].startswith("cpu") else here["device"]
    names = {"torch": "torch", "torchvision": "torchvision", "pillow": "Pillow", "cuda": "CUDA", "driver": "driver"}
    versions = ", ".join(f"{words} {here[name]}" for name, words in names.items() if here.get(name))
    return f"{device}, {here['cores']} cores, {here['threads']} threads of torch; {versions}"


def driver() -> str | None:
    """Version of the GPU's driver, as far as nvidia-smi tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def count(text: str) -> int:
    """A command line's number of things, at least one."""
    return _whole_number(text, 1)


def count_or_none(text: str) -> int:
    """A command line's number of things, 0 allowed."""
    return _whole_number(text, 0)


def _whole_number(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def parser(description: str) -> CommandLine:
    """With the arguments that every benchmark has: repeats, threads, device and output."""
    parser = CommandLine(prog=f"benchmarks/{Path(sys.argv[0]).name}", description=description)
    parser.add_argument("--repeats", type=count, default=5, help="medians are of so many (default: %(default)s)")
    parser.add_argument("--threads", type=count, help="of torch, on the CPU; default: torch's own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file; default: ./logs/benchmarks/<name>.json")
    return parser


def parse(parser: CommandLine) -> argparse.Namespace:
    """The arguments, with torch's threads set as they say. Raises UserError."""
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

    medians_of: what is repeated, where that is not so many measurements as `args.repeats` says.
    """
    here = machine(torch.device(args.device))
    content = {"date": time.strftime("%Y-%m-%d"), "environment": here, "repeats": args.repeats, "measured": measured}
    args.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print("\n\n".join(render(table) for table in tables))
    print(f"\n{describe(here)}; medians of {medians_of or args.repeats}")
    print(f"written to {args.output}")
