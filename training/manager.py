"""Saves, resumes and monitors a run while it trains. Every process has one; they agree before they act.

`Saver` writes and reads checkpoints. `RunManager` logs, responds to stop requests and rewinds after a number that is
not finite; the main process's alone writes and prints.
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch

from config import plain_values
from datasets.loading import Data, balanced_order
from training.checkpoint import Checkpoints
from training.distributed import AsyncMax
from training.health import collapse_message
from training.log import JSONL_FILES, Progress, RunLog, SilentLog, epoch_line
from training.signals import Stopped, StopRequest
from training.state import TrainingState
from utils import UserError, save_tensors, warn

REWINDS = 2  # times that a run is rewound to its last checkpoint after a number that is not finite


class Saver:
    """Checkpoints of a run's state, with the lengths of its log files at that moment.

    fingerprint: of the data. positions: lengths of the log files at the last checkpoint; None before the first.
    """

    def __init__(self, run: Path, state: TrainingState, fingerprint: str):
        self.run, self.state, self.fingerprint = run, state, fingerprint
        self.positions: dict[str, int] | None = None
        self.saved_at: tuple[int, int] | None = None  # finished epochs, and steps of the next one
        self.seconds = 0.0  # that the last checkpoint took
        self._checkpoints = Checkpoints(run / "checkpoints")

    def save(self, log: RunLog | SilentLog) -> None:
        """Write the state unless that is done. Raises NotFinite, in all processes, for what must not be saved."""
        now = self.state.epoch, self.state.step
        if self.saved_at == now:
            return
        began = time.perf_counter()
        saved = self.state.state_dict()
        self.positions = log.positions()
        if self.state.world.is_main:
            self._checkpoints.save(saved | {"positions": self.positions, "data": self.fingerprint})
        self.state.world.gather(None)  # no process continues, or reports the state as saved, before it is
        self.saved_at, self.seconds = now, time.perf_counter() - began

    def load(self, *, elastic: bool = False) -> bool:
        """Restore the newest undamaged checkpoint; returns whether there is one.

        elastic: if other processes or devices wrote it, the newest one from between two epochs, which is not exact.
        Raises UserError if all are damaged, or belong to other data, settings or processes.
        """
        state, world = self.state, self.state.world
        saved = self._newest()
        if saved is None:
            if world.is_main:
                self._require_no_finished_epoch()
            return False
        exact = state.fits(saved)
        if not exact and elastic:
            saved = self._newest(between_epochs=True)
            if world.is_main:
                warn(
                    f"{self.run}: continues from the start of epoch {saved['epoch'] + 1} with another number of "
                    "processes, or with other devices: the result will differ from that of an uninterrupted run"
                )
        elif not exact:
            first = saved["ranks"][0]
            each = " ".join(map(str, filter(None, (first["devices"], first.get("kind"), "devices"))))
            raise UserError(
                f"{self.run}: was trained by {len(saved['ranks'])} processes on {each} each and can only be resumed "
                f"exactly so, not by {world.size} on {len(world.devices)} {world.device.type}\n"
                "start it as before, or continue from the epoch's start, not exactly, with --resume-elastic"
            )
        if saved["data"] != self.fingerprint:
            raise UserError(
                f"{self.run}: cannot be resumed, the images in {state.config.dataroot} are not those it began with"
            )
        exact = state.fits(saved)
        state.load_state_dict(saved, self.run)
        positions = [saved["positions"].get(name) for name in JSONL_FILES]
        if not all(isinstance(position, int) and position >= 0 for position in positions):
            raise UserError(f"{self.run}: its checkpoint does not say how long the log files were")
        self.positions = saved["positions"]
        self.saved_at = (state.epoch, state.step) if exact else None
        # A process may have been killed after a rewind but before its next checkpoint.
        state.rewinds = max(state.rewinds, world.broadcast(count_rewinds(self.run) if world.is_main else 0))
        return True

    def _newest(self, *, between_epochs: bool = False) -> dict[str, Any] | None:
        world = self.state.world
        return world.broadcast(
            self._checkpoints.load_newest(warn, between_epochs=between_epochs) if world.is_main else None
        )

    def _require_no_finished_epoch(self) -> None:
        """Raises UserError for a run that has finished epochs, but has no checkpoint."""
        log = self.run / "metrics.jsonl"
        if log.exists() and log.stat().st_size:
            raise UserError(
                f"{self.run}: has finished epochs, but no checkpoint of this version\n"
                "restore one into checkpoints, or start from scratch with --overwrite"
            )


class RunManager:
    """Used as a context: it opens the run's log and handles stop requests.

    steps: of an epoch. fingerprint: of the data.
    """

    def __init__(self, run: Path, state: TrainingState, steps: int, fingerprint: str):
        self.run, self.state, self.steps = run, state, steps
        self.saver = Saver(run, state, fingerprint)
        self.stop_request = StopRequest(self._stop_message if state.world.is_main else None)
        self._agreed = AsyncMax(state.world)
        self._collapsed: str | None = None
        self._lap_began = time.perf_counter()
        self._step_seconds = 0.0

    def __enter__(self) -> "RunManager":
        with contextlib.ExitStack() as entered:
            self._open()
            entered.callback(self._close)
            entered.enter_context(self.stop_request)
            if self.saver.saved_at is None:  # fail now if the disk has no room for a checkpoint
                self.save()
            self._leave = entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._agreed.settle()
        self._leave.close()

    def load(self, *, elastic: bool = False) -> bool:
        return self.saver.load(elastic=elastic)

    def save(self) -> None:
        self.saver.save(self.log)

    def lap(self, doing: str) -> float:
        """Seconds since the last call, counted as spent on "train" or on "other" in this epoch."""
        now = time.perf_counter()
        seconds, self._lap_began = now - self._lap_began, now
        self.state.epoch_totals.seconds[doing] += seconds
        return seconds

    def after_step(self) -> None:
        """Save if it is due, and act on what any process has noticed, without waiting for the device.

        Raises NotFinite or, once the state is saved, Stopped; the same in all processes.
        """
        state = self.state
        self._step_seconds = self.lap("train")
        doing = f"epoch {state.epoch + 1}/{state.config.epochs}"
        self.progress.step(doing, state.epoch_totals.loss_and_correct, state.epoch_totals.copies)
        bad, signum = self._agreed(state.monitor.look(), self.stop_request.signum)
        if bad:
            state.require_finite()
        every = state.config.checkpoint_every
        if signum or (every and state.step % every == 0 and state.step < self.steps):
            self.save()
            self.lap("other")
        if signum:
            self._agreed.settle()
            raise Stopped(signum)

    def after_interval(self, record: dict[str, Any]) -> None:
        """Log the record of an interval, and report it if the controller has collapsed.

        One that is held above the entropy that counts as a collapse may favour an operation as much as that allows.
        """
        state, message = self.state, None
        held = record.get("entropy_floor", 0.0) > state.config.collapse_entropy
        if state.policies.learns and not held:
            operations, draws = record["shares"]["operations"], state.policies.op_MQK.numel()
            largest = state.policies.largest_entropy
            message = collapse_message(record["entropy"], largest, operations, draws, state.config.collapse_entropy)
        record["collapsed"] = message
        state.collapse = state.collapse.with_record(record)
        self.log.interval(record, state.policies.largest_entropy)
        if message and not self._collapsed:
            self.progress.say(f"after step {record['step']} the controller has collapsed: {message}")
        self._collapsed = message

    def end_epoch(self, metrics: dict[str, float], data: Data) -> None:
        """Count the epoch as finished; log, preview, save and print it. Raises Stopped if a stop was requested."""
        state = self.state
        self.lap("other")
        times = {f"{doing}_seconds": seconds for doing, seconds in state.epoch_totals.seconds.items()}
        times["copies_per_second"] = self.steps * state.config.batch_size * state.config.M / times["train_seconds"]
        state.end_epoch()
        step = state.epoch * self.steps
        self.log.epoch(state.epoch, step, metrics, times)
        if state.world.is_main:
            if state.epoch in preview_epochs(state.config.epochs):
                with torch.no_grad():
                    images = state.loader(data.train).preview(balanced_order(data.train.labels)[:8], state.epoch)
                self.log.policy_images(images, state.policies.descriptions(), step)
            save_model(self.run / "model.pt", state, data.classes)
        self.save()
        self.progress.say(epoch_line(state, metrics, times))
        self.stop_if_requested()

    def is_stop_requested(self) -> bool:
        """Of this process."""
        return bool(self.stop_request.signum)

    def stop_if_requested(self) -> None:
        """Between two pieces of work: if any process was asked to stop, save, and raise Stopped in all of them."""
        self._agreed.settle()
        signum = max(self.state.world.gather(self.stop_request.signum))
        if signum and self.state.epoch < self.state.config.epochs:
            self.save()
            raise Stopped(signum)

    def rewind(self, error: FloatingPointError) -> None:
        """After a number that is not finite: return to the last checkpoint if allowed, else raise UserError."""
        self._agreed.settle()
        state = self.state
        rewinds = state.rewinds + 1
        allowed = state.config.on_nonfinite == "rewind" and rewinds <= REWINDS
        what = self._log_incident(error, rewinds if allowed else None)
        if not allowed:
            again = f", after {REWINDS} rewinds" if state.rewinds else ""
            raise UserError(
                f"{self.run}: {what}{again}; earlier checkpoints are kept\n"
                "start another run with a lower lr, or with grad_clip or warmup_epochs set"
            ) from None
        if not self.load():
            raise UserError(f"{self.run}: {what}, and its checkpoints are gone; restore a copy, or start from scratch")
        state.rewinds = rewinds
        self.progress.say(f"back to epoch {state.epoch + 1}, step {state.step + 1} ({rewinds} of {REWINDS} rewinds)")
        self._close()
        self._open()

    def _log_incident(self, error: FloatingPointError, rewind: int | None) -> str:
        """Log what was not finite with the policies in use; returns what and where it was."""
        state = self.state
        step, ranks = getattr(error, "step", max(0, state.step - 1)), getattr(error, "ranks", [])
        of_policies = getattr(error, "policies", [])
        details = [f"process {', '.join(map(str, ranks))}"] if ranks else []
        details += [f"policy {', '.join(str(m + 1) for m in of_policies)}"] if of_policies else []
        what = f"{error} in epoch {state.epoch + 1}, step {step + 1}" + (f" ({'; '.join(details)})" if details else "")
        in_use = (f"  {number}. {policy}" for number, policy in enumerate(state.policies.descriptions(), start=1))
        message = "\n".join((f"{what}, with these policies in use:", *in_use))
        record = {
            "incident": str(error),
            "epoch": state.epoch + 1,
            "step": step + 1,
            "processes": ranks,
            "policies": state.policies.by_name(),
            "of_policies": of_policies,
            "rewind": rewind,
        }
        # TensorBoard drops what is logged for later steps than the run returns to, now or when it is resumed.
        epoch, finished = self.saver.saved_at
        self.log.incident(record, message, epoch * self.steps + finished)
        self.progress.say(message)
        return what

    def _open(self) -> None:
        state, is_main = self.state, self.state.world.is_main
        done = state.epoch * self.steps + state.step
        self.log = RunLog(self.run, self.saver.positions, step=done) if is_main else SilentLog()
        self.progress = Progress(state.config.epochs * self.steps, done=done, shown=is_main)

    def _close(self) -> None:
        self.progress.close()
        self.log.close()

    def _stop_message(self, name: str) -> str:
        about = max(1.0, self._step_seconds + self.saver.seconds)
        return f"{name}: finishing this step and saving, about {about:.0f} s; a second Ctrl-C exits without saving"


def count_rewinds(run: Path) -> int:
    """How often a run was rewound, according to its incidents.jsonl; an incomplete line does not count."""
    count, log = 0, run / "incidents.jsonl"
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else ():
        with contextlib.suppress(ValueError, AttributeError):
            count += json.loads(line).get("rewind") is not None
    return count


def preview_epochs(epochs: int) -> set[int]:
    """The first, the last, and about twenty between them."""
    every = max(1, epochs // 20)
    return {1, epochs, *range(every, epochs, every)}


def save_model(path: Path, state: TrainingState, classes: tuple[str, ...]) -> None:
    """The weights and what evaluate.py needs to use them, and the controller; tensors and plain values only."""
    content = {
        "model": state.model.state_dict(),
        "classes": list(classes),
        "epoch": state.epoch,
        "config": plain_values(state.config),
    }
    if state.ema:
        content["ema"] = state.ema.model.state_dict()
    if state.policies.learns:
        content["controller"] = state.policies.controller.state_dict()
    save_tensors(path, content)
