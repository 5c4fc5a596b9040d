"""Compare arms over seeds: runs what is missing, resumes what was stopped, scores, and writes a summary.

    python experiments.py controls                       # tiny: embedded data, CPU, minutes
    python experiments.py controls --size small --set dataroot=DIR       # CIFAR-10, one accelerator
    python experiments.py controls transfer --list       # the runs, their state, and their commands
    python experiments.py controls --seeds 3 4 --jobs 2  # two more seeds, two runs at a time

confs/experiments/NAME.yaml lists arms, which differ in settings, and sizes, which say what is trained and how long.
Every arm is run with every seed, and arms are compared seed by seed. A run's directory is
<logdir>/NAME-<size>/<arm>_<seed>, as written by main.py and evaluate.py; results/NAME/ gets runs.jsonl, summary.md and
figures. docs/experiments.md describes the file format.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before the imports that take long

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import torch

from analysis.specs import SIZES, Experiment, PlannedRun, are_seeds, experiment_names, load_experiment, runs_of
from training.exit import exit_with_status
from utils import CommandLine, UserError, duration, printable, warn

POLL_SECONDS = 0.1


def main() -> None:
    args = parse_arguments()
    for name in args.names:
        experiment = load_experiment(name, args.size, args.seeds, args.set)
        runs = list(runs_of(experiment, args.logdir))
        if args.list:
            print(list_runs(experiment, runs, args))
            continue
        try:
            run_missing(runs, args)
        except BaseException:
            try:
                summarise(experiment, runs, args.results)
            except UserError as error:
                warn(str(error))
            raise
        summarise(experiment, runs, args.results)


def summarise(experiment: Experiment, runs: Sequence[PlannedRun], results: Path) -> None:
    """Summarise the runs that have been scored, if there are any, and print where."""
    from analysis.summaries import write_summary  # imports much that --help does not need

    if scored := sum(run.is_scored() for run in runs):
        folder = results / experiment.name
        write_summary(experiment, runs, folder, shlex.join(["python", "experiments.py", *sys.argv[1:]]))
        unfinished = f" ({scored} of {len(runs)} runs)" if scored < len(runs) else ""
        print(f"{experiment.name}, {experiment.size}: {folder / 'summary.md'}{unfinished}", flush=True)


def list_runs(experiment: Experiment, runs: Sequence[PlannedRun], args: argparse.Namespace) -> str:
    lines = [f"{experiment.name}, {experiment.size}: {experiment.question}"]
    for run in runs:
        lines.append(f"  {run.name}: {run.state()}")
        lines += [f"    {_short_command(command)}" for command in ([] if run.is_scored() else commands_of(run, args))]
    return "\n".join(lines)


def _short_command(command: Sequence[str]) -> str:
    """As a user would type it in the working directory."""
    here = f"{Path.cwd()}{os.sep}"
    words = ("python" if word == sys.executable else word.removeprefix(here) for word in command)
    return shlex.join(words)


def commands_of(run: PlannedRun, args: argparse.Namespace, device: str | None = None) -> list[list[str]]:
    launcher = shlex.split(args.launcher) if args.launcher else [sys.executable]
    return run.commands(launcher, ("--device", device) if device else ())


class Job:
    """A run in progress: its commands, one after the other, and a file with their output."""

    def __init__(self, run: PlannedRun, args: argparse.Namespace, slot: int):
        self.run, self.slot, self.began = run, slot, time.monotonic()
        devices = torch.cuda.device_count()
        device = f"cuda:{slot % devices}" if devices and args.jobs > 1 and not args.launcher else None
        self.log = run.directory.with_suffix(".log")
        self._commands = commands_of(run, args, device)
        threads = str(max(1, (os.cpu_count() or 1) // args.jobs))
        self._environment = ({"OMP_NUM_THREADS": threads} if args.jobs > 1 else {}) | os.environ
        run.directory.parent.mkdir(parents=True, exist_ok=True)
        self._next()

    def _next(self) -> None:
        self._command = self._commands.pop(0)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(self._command)}\n".encode())
            log.flush()
            self.process = Popen(self._command, stdout=log, stderr=log, env=self._environment)

    def has_ended(self) -> bool:
        """Start the next command if one has ended; whether it was the last. Raises UserError for a failure."""
        status = self.process.poll()
        if status is None:
            return False
        if status:
            output = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            script = next(Path(word).name for word in self._command if word.endswith(".py"))
            raise UserError(
                f"{self.run.name}: {script} failed with status {status}: {printable(output[-1])}\n"
                f"its output is in {self.log}; once the cause is fixed, the same command continues"
            )
        if self._commands:
            self._next()
            return False
        return True


def run_missing(runs: Sequence[PlannedRun], args: argparse.Namespace) -> None:
    """Run what is missing, args.jobs at a time. On any error or signal, the runs in progress save and stop first."""
    waiting = [run for run in runs if not run.is_scored()]
    ended: list[tuple[PlannedRun, float]] = []
    jobs: list[Job] = []
    try:
        while waiting or jobs:
            for run in [run for run in waiting if not needs_source(run, waiting, jobs)]:
                if len(jobs) < args.jobs:
                    waiting.remove(run)
                    slot = min(set(range(args.jobs)) - {job.slot for job in jobs})
                    print(f"{run.name}: {run.state()}, starting", flush=True)
                    jobs.append(Job(run, args, slot))
            for job in [job for job in jobs if job.has_ended()]:
                jobs.remove(job)
                ended.append((job.run, time.monotonic() - job.began))
                rest = [*waiting, *(other.run for other in jobs)]
                to_go = f"{len(rest)} to go, about {duration(seconds_left(ended, rest, args.jobs))}"
                print(
                    f"{job.run.name}: done in {duration(ended[-1][1])}; {to_go if rest else 'nothing left'}", flush=True
                )
            time.sleep(POLL_SECONDS)
    except BaseException as stop:
        for job in jobs:
            if job.process.poll() is None:
                job.process.terminate()  # Ctrl-C has reached it already; while it saves, only the first signal counts
        for job in jobs:
            job.process.wait()
        if isinstance(stop, KeyboardInterrupt):
            raise type(stop)("the runs in progress are saved; the same command continues") from None
        raise


def needs_source(run: PlannedRun, waiting: Sequence[PlannedRun], jobs: Sequence[Job]) -> bool:
    """Whether the run that this one takes its policies from is not finished."""
    return run.source in [other.directory for other in (*waiting, *(job.run for job in jobs))]


def seconds_left(ended: Sequence[tuple[PlannedRun, float]], rest: Sequence[PlannedRun], jobs: int) -> float:
    """For the rest, if an augmented image takes as long as in the finished runs."""
    seen, to_see = (sum(run.config.M * run.config.epochs for run in runs) for runs in ([run for run, _ in ended], rest))
    return sum(seconds for _, seconds in ended) / seen * to_see / jobs


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(
        prog="experiments.py", description=__doc__, epilog="experiments: " + ", ".join(experiment_names())
    )
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="of confs/experiments/NAME.yaml, or a file")
    add("--size", choices=SIZES, default="tiny", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="default: the file's")
    add(
        "--set",
        nargs="+",
        default=[],
        action="extend",
        metavar="SETTING=VALUE",
        help="for all arms; replaces the file's",
    )
    add("--logdir", type=Path, default=Path("./logs"), metavar="DIR", help="of the runs (default: %(default)s)")
    add("--results", type=Path, default=Path("./results"), metavar="DIR", help="default: %(default)s")
    add("--jobs", type=int, default=1, metavar="J", help="runs at a time; each gets a GPU, or a share of the CPU cores")
    add("--launcher", metavar="COMMAND", help='starts main.py, such as "torchrun --nproc_per_node 8"')
    add("--list", action="store_true", help="run nothing; list the runs, their state and commands")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs} must be at least 1")
    if args.seeds and not are_seeds(args.seeds):
        parser.error("--seeds: must be different numbers, 0 or above")
    return args


if __name__ == "__main__":
    exit_with_status(main)
