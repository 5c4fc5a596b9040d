"""What long work tells: jsonl files, TensorBoard, a line per epoch on stdout, and a progress bar on a terminal.

`metrics.jsonl` and `policies.jsonl` hold no clock times, so that two equal runs write equal files; clocks are in
`times.jsonl`. TensorBoard's horizontal axis is the step throughout.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid
from tqdm import tqdm

from utils import UserError, cannot_write, duration

JSONL_FILES = ("metrics.jsonl", "policies.jsonl", "times.jsonl")


class RunLog:
    """Writes below `directory`. A resumed run gives the `positions` and `step` of its checkpoint: later lines go.

    Raises UserError where the disk is full or cannot be written to.
    """

    def __init__(self, directory: Path, positions: dict[str, int] | None = None, step: int = 0):
        self.directory = directory
        self._files = {}
        self._hook, threading.excepthook = threading.excepthook, self._in_a_thread
        with self._writing():
            for name, position in (positions or {}).items():  # before anything is changed
                path = directory / name
                if position > (path.stat().st_size if path.exists() else 0):
                    raise UserError(f"{path}: lacks lines that the checkpoint counts on; put a copy back")
            for name in JSONL_FILES:
                self._files[name] = (directory / name).open("ab")
                self._files[name].truncate((positions or {}).get(name, 0))
            # TensorBoard takes the first such mark for the run's start; at each later one, what comes after it goes.
            self._writer = SummaryWriter(str(directory), purge_step=step + 1 if positions else 0)

    def positions(self) -> dict[str, int]:
        """Length of each jsonl file in bytes, for the checkpoint; so much is on the disk then."""
        with self._writing():
            self._writer.flush()
            for file in self._files.values():
                os.fsync(file.fileno())
        return {name: file.seek(0, os.SEEK_END) for name, file in self._files.items()}

    def interval(self, record: dict[str, Any]) -> None:
        """A line of policies.jsonl for an interval that has ended, and its curves."""
        with self._writing():
            self._line("policies.jsonl", {name: value for name, value in record.items() if name != "shares"})
            for name in ("entropy", "loss_spread"):
                self._writer.add_scalar(f"policies/{name}", record[name], record["step"])
            self._writer.add_scalar("policies/collapsed", float(record["collapsed"] is not None), record["step"])
            for group, values in record["shares"].items():
                for name, share in values.items():
                    self._writer.add_scalar(f"{group}/{name}", share, record["step"])

    def epoch(self, epoch: int, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        """A line of metrics.jsonl and one of times.jsonl for an epoch that has ended, and its curves."""
        with self._writing():
            self._line("metrics.jsonl", {"epoch": epoch, "step": step, **metrics})
            self._line("times.jsonl", {"epoch": epoch, **times})
            for name, value in (metrics | {"images_per_second": times["images_per_second"]}).items():
                self._writer.add_scalar(f"epoch/{name}", value, step)
            self._writer.flush()

    def incident(self, record: dict[str, Any], words: str, step: int) -> None:
        """A line of incidents.jsonl, which keeps what went wrong whatever the run goes back to, and a text."""
        with self._writing():
            with (self.directory / "incidents.jsonl").open("ab") as file:
                file.write((json.dumps(record) + "\n").encode())
                os.fsync(file.fileno())
            self._writer.add_text("incidents", words, step)
            self._writer.flush()

    def policy_images(self, rows: Tensor, captions: list[str], step: int) -> None:
        """uint8 images (rows, columns, C, H, W), a row per policy, and each row's caption. Small ones are enlarged."""
        scale = max(1, 96 // rows.shape[-1])
        images = rows.flatten(0, 1).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        words = "\n".join(f"{row + 1}. {text}" for row, text in enumerate(captions))
        with self._writing():
            self._writer.add_image("policies", make_grid(images.cpu(), nrow=rows.shape[1]), step)
            self._writer.add_text("policies", words, step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be written has been complained of, or comes after the end
            self._writer.close()
            for file in self._files.values():
                file.close()
        threading.excepthook = self._hook

    def _in_a_thread(self, error: threading.ExceptHookArgs) -> None:
        """What fails in TensorBoard's thread is raised again by its writer's next call; it needs no traceback."""
        if not issubclass(error.exc_type, OSError):
            self._hook(error)

    def _line(self, name: str, record: dict[str, Any]) -> None:
        self._files[name].write((json.dumps(record) + "\n").encode())
        self._files[name].flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.directory}: {cannot_write(self.directory, error)}") from None


class SilentLog:
    """The log of a process that leaves writing to another."""

    def positions(self) -> dict[str, int]:
        return {}

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    interval = epoch = incident = policy_images = close = _nothing


class Progress:
    """A bar over all steps of a run, with loss, accuracy and time left; silent where stderr is no terminal.

    shown: False for a process that leaves printing to another.
    """

    def __init__(self, steps: int, done: int, *, shown: bool = True):
        self._shown_at = 0.0
        self._speaks = shown
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None if shown else True, dynamic_ncols=True)

    def step(self, description: str, loss_and_correct: Tensor, images: int) -> None:
        """Advance. The device is asked for its sums twice a second at most, and never without a bar."""
        if not self._bar.disable and time.monotonic() - self._shown_at > 0.5:
            loss, correct = (loss_and_correct / images).tolist()
            self._bar.set_description(description, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {correct:.1%}", refresh=False)
            self._shown_at = time.monotonic()
        self._bar.update()

    def say(self, line: str) -> None:
        """Print to stdout without tearing the bar."""
        if self._speaks:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


class ImageProgress:
    """Images done of many, with time left: a bar on a terminal, elsewhere a line on stderr twice a minute at most.

    shown: False for a process that leaves printing to another.
    """

    def __init__(self, images: int, *, shown: bool = True):
        self._started = self._spoke_at = time.monotonic()
        self._speaks = shown
        self._done, self._images, self._doing = 0, images, ""
        self._bar = tqdm(total=images, unit="image", leave=False, disable=None if shown else True, dynamic_ncols=True)

    def begin(self, doing: str) -> None:
        self._doing = doing
        self._bar.set_description(doing)

    def update(self, images: int) -> None:
        self._done = min(self._done + images, self._images)
        self._bar.update(self._done - self._bar.n)
        now = time.monotonic()
        if self._bar.disable and self._speaks and now - self._spoke_at > 30:
            left = duration((now - self._started) / self._done * (self._images - self._done))
            print(f"{self._doing}: {self._done:,} of {self._images:,} images, {left} left", file=sys.stderr, flush=True)
            self._spoke_at = now

    def close(self) -> None:
        self._bar.close()
