"""Experiments as files: runs what is missing, resumes what stopped, scores, and sums up.

    python experiments.py controls                       # tiny: embedded data, CPU, minutes
    python experiments.py controls --size small --set dataroot=DIR       # CIFAR-10, one accelerator
    python experiments.py controls transfer --list       # the runs, how far each is, and its command
    python experiments.py controls --seeds 3 4 --jobs 2  # two more seeds, two runs at a time

experiments/NAME.yaml lists arms, which differ in settings, and sizes, which say what an arm is trained on, and for how
long. Every arm is run once for each seed: arms are compared seed by seed. Runs lie in <logdir>/NAME-<size>/<arm>_<seed>
and are those of main.py and evaluate.py; results/NAME/ holds runs.jsonl, summary.md and figures.

A setting "policy_from: @ARM" means the run of that arm with the same seed.
"""

if __name__ == "__main__":
    from training.signals import begin

    begin()  # before all that takes its time to import

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen

import torch

from analysis.specs import FOLDER, SIZES, Experiment, Run, are_seeds, load_experiment, runs_of
from analysis.summaries import sum_up
from training.exit import exit_with_status
from utils import CommandLine, UserError, duration, printable, warn

SECONDS_BETWEEN_LOOKS = 0.1


def main() -> None:
    args = parse_arguments()
    for name in args.names:
        experiment = load_experiment(name, args.size, args.seeds, args.set)
        runs = list(runs_of(experiment, args.logdir))
        if args.list:
            print(listed(experiment, runs, args))
            continue
        try:
            carry_out(runs, args)
        except BaseException:
            try:
                conclude(experiment, runs, args.results)
            except UserError as error:
                warn(str(error))
            raise
        conclude(experiment, runs, args.results)


def conclude(experiment: Experiment, runs: Sequence[Run], results: Path) -> None:
    """Sum up the runs that have been scored, if there are any, and say where."""
    if scored := sum(run.is_scored() for run in runs):
        folder = results / experiment.name
        sum_up(experiment, runs, folder)
        unfinished = f" ({scored} of {len(runs)} runs)" if scored < len(runs) else ""
        print(f"{experiment.name}, {experiment.size}: {folder / 'summary.md'}{unfinished}", flush=True)


def listed(experiment: Experiment, runs: Sequence[Run], args: argparse.Namespace) -> str:
    lines = [f"{experiment.name}, {experiment.size}: {experiment.question}"]
    for run in runs:
        lines.append(f"  {run.name}: {run.state()}")
        lines += [f"    {_as_typed(command)}" for command in ([] if run.is_scored() else commands_of(run, args))]
    return "\n".join(lines)


def _as_typed(command: Sequence[str]) -> str:
    """Short, as one would type it in the working directory."""
    here = f"{Path.cwd()}{os.sep}"
    words = ("python" if word == sys.executable else word.removeprefix(here) for word in command)
    return shlex.join(words)


def commands_of(run: Run, args: argparse.Namespace, device: str | None = None) -> list[list[str]]:
    launcher = shlex.split(args.launcher) if args.launcher else [sys.executable]
    return run.commands(launcher, ("--device", device) if device else ())


class Job:
    """A run that is being carried out, its commands one after the other; what they say is in a file beside it."""

    def __init__(self, run: Run, args: argparse.Namespace, slot: int):
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
        self._doing = self._commands.pop(0)
        with self.log.open("ab") as log:
            log.write(f"$ {shlex.join(self._doing)}\n".encode())
            log.flush()
            self.process = Popen(self._doing, stdout=log, stderr=log, env=self._environment)

    def has_ended(self) -> bool:
        """Go on to the next command where one has ended; whether it was the last. Raises UserError for a failure."""
        status = self.process.poll()
        if status is None:
            return False
        if status:
            said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            script = next(Path(word).name for word in self._doing if word.endswith(".py"))
            raise UserError(
                f"{self.run.name}: {script} ended with status {status}: {printable(said[-1])}\n"
                f"all that it said is in {self.log}; mend it, and the same command goes on"
            )
        if self._commands:
            self._next()
            return False
        return True


def carry_out(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """Run what is missing, so many at a time. Whatever ends it, the runs under way are saved."""
    left = [run for run in runs if not run.is_scored()]
    ended: list[tuple[Run, float]] = []
    jobs: list[Job] = []
    try:
        while left or jobs:
            for run in [run for run in left if not waits(run, left, jobs)]:
                if len(jobs) < args.jobs:
                    left.remove(run)
                    slot = min(set(range(args.jobs)) - {job.slot for job in jobs})
                    print(f"{run.name}: {run.state()}, begins", flush=True)
                    jobs.append(Job(run, args, slot))
            for job in [job for job in jobs if job.has_ended()]:
                jobs.remove(job)
                ended.append((job.run, time.monotonic() - job.began))
                rest = [*left, *(other.run for other in jobs)]
                to_go = f"{len(rest)} to go, about {duration(seconds_left(ended, rest, args.jobs))}"
                print(f"{job.run.name}: done in {duration(ended[-1][1])}; {to_go if rest else 'the last'}", flush=True)
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except BaseException as stop:
        for job in jobs:
            if job.process.poll() is None:
                job.process.terminate()  # Ctrl-C has reached it already; one that is saving heeds only the first
        for job in jobs:
            job.process.wait()
        if isinstance(stop, KeyboardInterrupt):
            raise type(stop)("the runs under way are saved; the same command goes on") from None
        raise


def waits(run: Run, left: Sequence[Run], jobs: Sequence[Job]) -> bool:
    """Whether the run that this one takes its policies from is still to end."""
    return run.source in [other.directory for other in (*left, *(job.run for job in jobs))]


def seconds_left(ended: Sequence[tuple[Run, float]], rest: Sequence[Run], jobs: int) -> float:
    """For the rest, if an image that the network sees takes as long as in the runs that have ended."""
    seen, to_see = (sum(run.config.M * run.config.epochs for run in runs) for runs in ([run for run, _ in ended], rest))
    return sum(seconds for _, seconds in ended) / seen * to_see / jobs


def parse_arguments() -> argparse.Namespace:
    parser = CommandLine(prog="experiments.py", description=__doc__, epilog=epilog())
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="of experiments/NAME.yaml, or a file")
    add("--size", choices=SIZES, default="tiny", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="default: the file's")
    add("--set", nargs="+", default=[], action="extend", metavar="SETTING=VALUE", help="for all arms, over the file's")
    add("--logdir", type=Path, default=Path("./logs"), metavar="DIR", help="where runs are kept (default: %(default)s)")
    add("--results", type=Path, default=Path("./results"), metavar="DIR", help="default: %(default)s")
    add("--jobs", type=int, default=1, metavar="J", help="runs at a time; each gets a GPU, or a part of the CPU")
    add("--launcher", metavar="COMMAND", help='what starts main.py, such as "torchrun --nproc_per_node 8"')
    add("--list", action="store_true", help="run nothing: list the runs, how far they are, and their commands")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs: {args.jobs} must be at least 1")
    if args.seeds and not are_seeds(args.seeds):
        parser.error("--seeds: must be different numbers, none below 0")
    return args


def epilog() -> str:
    return "experiments: " + ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))


if __name__ == "__main__":
    exit_with_status(main)
