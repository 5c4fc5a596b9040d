"""What stands by a run while it trains: saves its state, watches its numbers, heeds wishes to stop, and goes back.

One in each process; they agree before they act, and the leader's alone writes and prints.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from training.checkpoint import Checkpoints
from training.distributed import AsyncMax
from training.health import collapse
from training.log import JSONL_FILES, Progress, RunLog, SilentLog
from training.signals import Stopped, StopRequest
from training.state import TrainingState
from utils import UserError, warn

REWINDS = 2  # times that a run goes back to its last checkpoint after numbers that are not finite


def require_nothing_finished(run: Path) -> None:
    """Raises UserError for a run that has come further than to its first checkpoint, but has none."""
    log = run / "metrics.jsonl"
    if log.exists() and log.stat().st_size:
        raise UserError(
            f"{run}: has finished epochs, but no checkpoint of this version\n"
            "put one back into checkpoints, or start anew with --overwrite"
        )


def count_rewinds(run: Path) -> int:
    """How often a run went back, as its incidents.jsonl has it; a line that is cut short does not count."""
    count, log = 0, run / "incidents.jsonl"
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            count += json.loads(line).get("rewind") is not None
    return count


class RunManager:
    """Entered as a context, it opens the run's log, and the process ends by signals only as it says.

    steps: of an epoch. fingerprint: of the data.
    """

    def __init__(self, run: Path, state: TrainingState, steps: int, fingerprint: str):
        self.run, self.state, self.steps = run, state, steps
        self.stop_request = StopRequest(self._describe if state.world.is_main else None)
        self._fingerprint = fingerprint
        self._checkpoints = Checkpoints(run / "checkpoints")
        self._noticed = AsyncMax(state.world)
        self._positions: dict[str, int] | None = None  # of the log at the last checkpoint
        self._saved_at = self._collapsed = None
        self._lap_began = time.perf_counter()
        self._step_seconds = self._save_seconds = 0.0

    def __enter__(self) -> "RunManager":
        with contextlib.ExitStack() as entered:
            self._open()
            entered.callback(self._close)
            entered.enter_context(self.stop_request)
            if self._saved_at is None:  # if it does not fit on the disk, it is better known now
                self.save()
            self._leave = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._noticed.settle()
        self._leave.close()

    def load(self, *, elastic: bool = False) -> bool:
        """Bring the state to that of the newest whole checkpoint; returns whether there is one.

        elastic: where other processes or devices wrote it, to the newest from between two epochs, which is not exact.
        Raises UserError where there are only damaged ones, or those of other data, settings or processes.
        """
        state, world = self.state, self.state.world
        saved = world.broadcast(self._checkpoints.load_newest(warn) if world.is_main else None)
        if saved is None:
            if world.is_main:
                require_nothing_finished(self.run)
            return False
        if elastic and not state.fits(saved):
            newest = self._checkpoints.load_newest(warn, between_epochs=True) if world.is_main else None
            saved = world.broadcast(newest)
            if world.is_main:
                warn(
                    f"{self.run}: goes on from the start of epoch {saved['epoch'] + 1} with other processes or devices "
                    "than it began with: not exactly the run that it would have been"
                )
        elif not state.fits(saved):
            raise UserError(
                f"{self.run}: was trained by {len(saved['ranks'])} processes on {saved['ranks'][0]['devices']} devices "
                f"each and can only be resumed exactly so, not by {world.size} on {len(world.devices)}\n"
                "start as many, or go on from the epoch's start, not exactly, with --resume-elastic"
            )
        if saved["data"] != self._fingerprint:
            raise UserError(
                f"{self.run}: cannot be resumed, the images in {state.config.dataroot} are not those it began with"
            )
        exact = state.fits(saved)
        state.load_state_dict(saved, self.run)
        positions = [saved["positions"].get(name) for name in JSONL_FILES]
        if not all(isinstance(position, int) and position >= 0 for position in positions):
            raise UserError(f"{self.run}: its checkpoint does not say where the lines of the log end")
        self._positions = saved["positions"]
        self._saved_at = (state.epoch, state.step) if exact else None
        # Those of a process that was killed before it could save that it went back.
        state.rewinds = max(state.rewinds, world.broadcast(count_rewinds(self.run) if world.is_main else 0))
        return True

    def save(self) -> None:
        """Write the state, unless that is done already.

        Raises NotFinite, in all processes, for numbers that must not be saved.
        """
        if self._saved_at == (self.state.epoch, self.state.step):
            return
        began = time.perf_counter()
        saved = self.state.state_dict()
        self._positions = self.log.positions()
        if self.state.world.is_main:
            self._checkpoints.save(saved | {"positions": self._positions, "data": self._fingerprint})
        self.state.world.gather(None)  # nobody goes on, or says that it is saved, before it is
        self._saved_at = self.state.epoch, self.state.step
        self._save_seconds = time.perf_counter() - began

    def lap(self, doing: str) -> float:
        """Seconds since the last call, which count as those that the epoch has spent on "train" or on "other"."""
        now = time.perf_counter()
        seconds, self._lap_began = now - self._lap_began, now
        self.state.epoch_totals.seconds[doing] += seconds
        return seconds

    def after_step(self) -> None:
        """Between two steps: save where that is due, and act on what any process has noticed; none waits.

        Raises NotFinite or, when the state is saved, Stopped; the same in all processes.
        """
        state = self.state
        self._step_seconds = self.lap("train")
        doing = f"epoch {state.epoch + 1}/{state.config.epochs}"
        self.progress.step(doing, state.epoch_totals.loss_and_correct, state.epoch_totals.copies)
        bad, signum = self._noticed(state.monitor.look(), self.stop_request.signum)
        if bad:
            state.require_finite()
        every = state.config.checkpoint_every
        if signum or (every and state.step % every == 0 and state.step < self.steps):
            self.save()
            self.lap("other")
        if signum:
            self._noticed.settle()
            raise Stopped(signum)

    def after_interval(self, record: dict[str, Any]) -> None:
        """Log what the policies' source says of an interval, and raise the alarm if it has collapsed."""
        state, words = self.state, None
        if state.policies.learns:
            operations, draws = record["shares"]["operations"], state.policies.op_MQK.numel()
            largest = state.policies.largest_entropy
            words = collapse(record["entropy"], largest, operations, draws, state.config.collapse_entropy)
        record["collapsed"] = words
        state.collapse = state.collapse.with_record(record)
        self.log.interval(record)
        if words and not self._collapsed:
            self.progress.say(f"after step {record['step']} the controller has collapsed: {words}")
        self._collapsed = words

    def stop_if_requested(self) -> None:
        """Where nothing is under way: if any process is wished to stop, save, and raise Stopped in all of them."""
        self._noticed.settle()
        signum = max(self.state.world.gather(self.stop_request.signum))
        if signum and self.state.epoch < self.state.config.epochs:
            self.save()
            raise Stopped(signum)

    def go_back(self, error: FloatingPointError) -> None:
        """After numbers that are not finite: to the last checkpoint, if the run may; otherwise UserError tells all."""
        self._noticed.settle()
        state = self.state
        rewinds = state.rewinds + 1
        goes_back = state.config.on_nonfinite == "rewind" and rewinds <= REWINDS
        what = self._log_incident(error, rewinds if goes_back else None)
        if not goes_back:
            again = f", after going back {REWINDS} times" if state.rewinds else ""
            raise UserError(
                f"{self.run}: {what}{again}; what was saved before is kept\n"
                "start another run with a lower lr, or with grad_clip or warmup_epochs set"
            ) from None
        if not self.load():
            raise UserError(f"{self.run}: {what}, and its checkpoints are gone; put a copy back, or start anew")
        state.rewinds = rewinds
        self.progress.say(f"back to epoch {state.epoch + 1}, step {state.step + 1} ({rewinds} of {REWINDS} times)")
        self._close()
        self._open()

    def _log_incident(self, error: FloatingPointError, rewind: int | None) -> str:
        """Tell of it where it will be looked for, with the policies in use; returns what and where it was, in words."""
        state = self.state
        step, ranks = getattr(error, "step", max(0, state.step - 1)), getattr(error, "ranks", [])
        of_policies = getattr(error, "policies", [])
        details = [f"process {', '.join(map(str, ranks))}"] if ranks else []
        details += [f"policy {', '.join(str(m + 1) for m in of_policies)}"] if of_policies else []
        what = f"{error} in epoch {state.epoch + 1}, step {step + 1}" + (f" ({'; '.join(details)})" if details else "")
        in_use = (f"  {number}. {words}" for number, words in enumerate(state.policies.describe(), start=1))
        words = "\n".join((f"{what}, with these policies in use:", *in_use))
        record = {
            "incident": str(error),
            "epoch": state.epoch + 1,
            "step": step + 1,
            "processes": ranks,
            "policies": state.policies.by_name(),
            "of_policies": of_policies,
            "rewind": rewind,
        }
        # TensorBoard forgets what is shown of later steps than the run goes back to, now or when it is resumed.
        epoch, finished = self._saved_at
        self.log.incident(record, words, epoch * self.steps + finished)
        self.progress.say(words)
        return what

    def _open(self) -> None:
        state, leads = self.state, self.state.world.is_main
        done = state.epoch * self.steps + state.step
        self.log = RunLog(self.run, self._positions, step=done) if leads else SilentLog()
        self.progress = Progress(state.config.epochs * self.steps, done=done, shown=leads)

    def _close(self) -> None:
        self.progress.close()
        self.log.close()

    def _describe(self, name: str) -> str:
        about = max(1.0, self._step_seconds + self._save_seconds)
        return f"{name}: finishing this step and saving, about {about:.0f} s; a second Ctrl-C ends it without saving"
