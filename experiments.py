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
    launcher = shlex.split(args.launcher) if args.launcher else [sys.executable]
    for name in args.names:
        experiment = load_experiment(name, args.size, args.seeds, args.set)
        runs = list(runs_of(experiment, args.logdir))
        if args.list:
            list_runs(experiment, runs, launcher)
            continue
        try:
            run_missing(runs, launcher, args.jobs)
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


def list_runs(experiment: Experiment, runs: Sequence[PlannedRun], launcher: Sequence[str]) -> None:
    """Print each run's state and, as a user would type them, the commands that are still to be run."""
    print(f"{experiment.name}, {experiment.size}: {experiment.question}")
    for run in runs:
        print(f"  {run.name}: {run.state()}")
        for command in [] if run.is_scored() else run.commands(launcher, ()):
            words = ("python" if word == sys.executable else word.removeprefix(f"{Path.cwd()}/") for word in command)
            print(f"    {shlex.join(words)}")


class Job:
    """A run in progress: its commands, one after the other, and a file with their output."""

    def __init__(self, run: PlannedRun, launcher: Sequence[str], slot: int, slots: int):
        self.run, self.slot, self.began = run, slot, time.monotonic()
        self.log = run.directory.with_suffix(".log")
        options, self._environment = [], dict(os.environ)
        if slots > 1:
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
            if (devices := torch.cuda.device_count()) and launcher == [sys.executable]:
                options = ["--device", f"cuda:{slot % devices}"]
        self._commands = run.commands(launcher, options)
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
        if status:
            output = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            script = next(Path(word).name for word in self._command if word.endswith(".py"))
            raise UserError(
                f"{self.run.name}: {script} failed with status {status}: {printable(output[-1])}\n"
                f"its output is in {self.log}; once the cause is fixed, the same command continues"
            )
        if status is None or not self._commands:
            return status == 0
        self._next()
        return False


def run_missing(runs: Sequence[PlannedRun], launcher: Sequence[str], most: int) -> None:
    """Run what is missing, `most` at a time. On any error or signal, the runs in progress save and stop first."""
    waiting = [run for run in runs if not run.is_scored()]
    jobs: list[Job] = []
    try:
        while waiting or jobs:
            unfinished = {run.directory for run in (*waiting, *(job.run for job in jobs))}
            for run in [run for run in waiting if run.source not in unfinished][: most - len(jobs)]:
                waiting.remove(run)
                print(f"{run.name}: {run.state()}, starting", flush=True)
                jobs.append(Job(run, launcher, min(set(range(most)) - {job.slot for job in jobs}), most))
            for job in [job for job in jobs if job.has_ended()]:
                jobs.remove(job)
                took = duration(time.monotonic() - job.began)
                print(f"{job.run.name}: done in {took}; {len(waiting) + len(jobs)} to go", flush=True)
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


def parse_arguments() -> argparse.Namespace:
    epilog = f"experiments: {', '.join(experiment_names())}"
    parser = CommandLine(prog="experiments.py", description=__doc__, epilog=epilog)
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="of confs/experiments/NAME.yaml, or a file")
    add("--size", choices=SIZES, default="tiny", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="default: the file's")
    add("--set", nargs="+", default=[], action="extend", metavar="SETTING=VALUE", help="for all arms, over the file's")
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
