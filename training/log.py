"""What a run prints and records: jsonl files, TensorBoard, lines on stdout, and a progress bar on a terminal.

`metrics.jsonl` and `policies.jsonl` hold no clock times, so that two equal runs write equal files; those are in
`times.jsonl`. TensorBoard's horizontal axis is the step throughout.
"""

import contextlib
import json
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from config import DEFAULT_CONF
from datasets.loading import Data
from policies.preferences import verdict
from training.signals import Stopped, Terminated
from training.state import TrainingState
from utils import UserError, cannot_write, duration

JSONL_FILES = ("metrics.jsonl", "policies.jsonl", "times.jsonl")
START_FLAGS = ("--overwrite", "--resume", "--resume-elastic", "--resume_elastic")  # not repeated in a resume command
# TensorBoard's charts are sorted by name: training curves come first, shares of operations and levels last.
CHARTS = {
    "train_top1": "accuracy/train", "test_top1": "accuracy/test", "valid_top1": "accuracy/valid",
    "test_top1_best_seen": "accuracy/test_best_seen", "valid_top1_best_seen": "accuracy/valid_best_seen",
    "train_loss": "loss/train", "test_loss": "loss/test", "valid_loss": "loss/valid",
    "test_ema_top1": "accuracy/test_ema", "valid_ema_top1": "accuracy/valid_ema",
    "test_ema_loss": "loss/test_ema", "valid_ema_loss": "loss/valid_ema",
}  # fmt: skip


class RunLog:
    """Writes below `directory`. A resumed run gives the `positions` and `step` of its checkpoint: later lines are cut.

    Raises UserError where the disk is full or cannot be written to.
    """

    def __init__(self, directory: Path, positions: dict[str, int] | None = None, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

        self.directory = directory
        self._files = {}
        self._hook, threading.excepthook = threading.excepthook, self._in_a_thread
        with self._writing():
            for name, position in (positions or {}).items():  # before anything is changed
                path = directory / name
                if position > (path.stat().st_size if path.exists() else 0):
                    raise UserError(f"{path}: is shorter than when the checkpoint was written; restore a copy")
            for name in JSONL_FILES:
                self._files[name] = (directory / name).open("ab")
                self._files[name].truncate((positions or {}).get(name, 0))
            # TensorBoard takes the first such mark for the run's start, and drops later steps at each further one.
            self._writer = SummaryWriter(str(directory), purge_step=step + 1 if positions else 0)

    def positions(self) -> dict[str, int]:
        """Length of each jsonl file in bytes, for the checkpoint, after writing them to the disk."""
        with self._writing():
            self._writer.flush()
            for file in self._files.values():
                os.fsync(file.fileno())
        return {name: file.seek(0, os.SEEK_END) for name, file in self._files.items()}

    def interval(self, record: dict[str, Any], largest_entropy: float) -> None:
        """A line of policies.jsonl for an interval that has ended, and its curves."""
        step = record["step"]
        with self._writing():
            self._line("policies.jsonl", {name: value for name, value in record.items() if name != "shares"})
            if largest_entropy:
                self._writer.add_scalar("adversary/entropy_share", record["entropy"] / largest_entropy, step)
            if "entropy_floor" in record:
                self._writer.add_scalar("adversary/entropy_floor", record["entropy_floor"], step)
            self._writer.add_scalar("adversary/loss_spread", record["loss_spread"], step)
            self._writer.add_scalar("adversary/collapsed", float(record["collapsed"] is not None), step)
            for group, values in record["shares"].items():
                for name, share in values.items():
                    self._writer.add_scalar(f"{group}/{name}", share, step)

    def epoch(self, epoch: int, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        """A line of metrics.jsonl and one of times.jsonl for an epoch that has ended, and its curves."""
        with self._writing():
            self._line("metrics.jsonl", {"epoch": epoch, "step": step, **metrics})
            self._line("times.jsonl", {"epoch": epoch, **times})
            for name, value in (metrics | {"copies_per_second": times["copies_per_second"]}).items():
                if name not in ("entropy", "loss_spread"):  # charts of the intervals
                    self._writer.add_scalar(CHARTS.get(name, f"run/{name}"), value, step)
            self._writer.flush()

    def incident(self, record: dict[str, Any], message: str, step: int) -> None:
        """A line of incidents.jsonl, which is kept when the run is rewound, and a text."""
        with self._writing():
            with (self.directory / "incidents.jsonl").open("ab") as file:
                file.write((json.dumps(record) + "\n").encode())
                os.fsync(file.fileno())
            self._writer.add_text("incidents", message, step)
            self._writer.flush()

    def policy_images(self, images: Tensor, descriptions: Sequence[str], step: int) -> None:
        """uint8 images (policies, images, C, H, W), a labelled row for each policy. Small images are enlarged."""
        with self._writing():
            self._writer.add_image("policies", labelled_rows(images, descriptions), step)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what cannot be written has been reported, or follows the end
            self._writer.close()
            for file in self._files.values():
                file.close()
        threading.excepthook = self._hook

    def _in_a_thread(self, error: threading.ExceptHookArgs) -> None:
        """A failure in TensorBoard's thread is raised again by its writer's next call and needs no traceback."""
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
    """The log of a process that leaves writing to the main process."""

    def positions(self) -> dict[str, int]:
        return {}

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    interval = epoch = incident = policy_images = close = _nothing


class Progress:
    """A bar over all steps of a run, with loss, accuracy and time left; silent where stderr is no terminal.

    shown: False for a process that must not print.
    """

    def __init__(self, steps: int, done: int, *, shown: bool = True):
        self._shown_at = 0.0
        self._prints = shown
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None if shown else True, dynamic_ncols=True)

    def step(self, description: str, loss_and_correct: Tensor, copies: int) -> None:
        """Advance. The sums are read from the device twice a second at most, and never without a bar."""
        if not self._bar.disable and time.monotonic() - self._shown_at > 0.5:
            loss, correct = (loss_and_correct / copies).tolist()
            self._bar.set_description(description, refresh=False)
            self._bar.set_postfix_str(f"loss {loss:.3f}, accuracy {correct:.1%}", refresh=False)
            self._shown_at = time.monotonic()
        self._bar.update()

    def say(self, line: str) -> None:
        """Print to stdout without breaking the bar."""
        if self._prints:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def labelled_rows(images: Tensor, descriptions: Sequence[str]) -> Tensor:
    """A picture of uint8 images (rows, columns, C, H, W), each row below its number and description; (3, H, W)."""
    scale, gap, line = max(1, 96 // images.shape[-1]), 2, 12
    images = images.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    _, columns, _, height, width = images.shape
    wrapped = [
        textwrap.wrap(f"policy {row}: {text}", max(20, columns * (width + gap) // 6))
        for row, text in enumerate(descriptions, start=1)
    ]
    total = sum(line * len(text) + height + 2 * gap for text in wrapped)
    picture = Image.new("RGB", (columns * (width + gap), total), "white")
    pen, top = ImageDraw.Draw(picture), 0
    for row, text in zip(images, wrapped, strict=True):
        for words in text:
            pen.text((gap, top), words, fill="black")
            top += line
        for column, image_CHW in enumerate(row):
            picture.paste(Image.fromarray(image_CHW.permute(1, 2, 0).numpy()), (column * (width + gap), top + gap))
        top += height + 2 * gap
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(total, -1, 3).permute(2, 0, 1)


def header(run: Path, state: TrainingState, data: Data) -> str:
    """The first lines of a run: what is trained on what, and where it is recorded."""
    config, world = state.config, state.world
    processes = f", {world.size} processes" if world.size > 1 else f" x {len(world.devices)}" * (len(world.devices) > 1)
    sizes = f"{len(data.train.labels):,} training and {len(data.test.labels):,} test images"
    return (
        f"{config.model} on {config.dataset} ({sizes} of {len(data.classes)} classes), {world.device}{processes}\n"
        f"policy {config.policy}, M = {config.M}, {config.epochs} epochs; run directory {run}"
    )


def epoch_line(state: TrainingState, metrics: dict[str, float], times: dict[str, float]) -> str:
    parts = [
        f"epoch {state.epoch}/{state.config.epochs}",
        f"loss {metrics['train_loss']:.3f}",
        f"accuracy {metrics['train_top1']:.1%}",
    ]
    for name in ("test", "valid"):
        if f"{name}_top1" in metrics:
            parts += [f"{name} loss {metrics[f'{name}_loss']:.3f}", f"{name} accuracy {metrics[f'{name}_top1']:.1%}"]
        if f"{name}_ema_top1" in metrics:
            parts.append(f"{name} accuracy of the averaged weights {metrics[f'{name}_ema_top1']:.1%}")
    if state.policies.learns and "entropy" in metrics:
        parts.append(f"entropy {metrics['entropy'] / state.policies.largest_entropy:.1%}")
    if metrics.get("skipped_steps"):
        parts.append(f"{metrics['skipped_steps']} steps skipped (float16)")
    left = (state.config.epochs - state.epoch) * (times["train_seconds"] + times["other_seconds"])
    return ", ".join([*parts, f"{times['copies_per_second']:,.0f} copies/s", f"{duration(left)} left"])


def closing_message(run: Path, state: TrainingState) -> str:
    """The last lines of a run: what the adversary did, and the commands that people need next."""
    lines = ["", f"Finished {state.epoch} of {state.config.epochs} epochs; the run is in {run}."]
    if state.policies.learns:
        lines.append(adversary_summary(run, state))
    if state.collapse.intervals:
        lines.append(
            f"The controller collapsed: in {state.collapse.intervals} intervals, first after step "
            f"{state.collapse.first}; see policies.jsonl."
        )
    if state.rewinds:
        times = "once" if state.rewinds == 1 else f"{state.rewinds} times"
        lines.append(f"The run was rewound {times} after a number that was not finite; see incidents.jsonl.")
    commands = {
        "evaluate": in_shell("evaluate.py", "--checkpoint", str(run)),
        "report": in_shell("report.py", str(run)),
        "curves": f"tensorboard --logdir {shlex.quote(str(run.parent))}",
    }
    if state.policies.learns and not state.world.in_group:
        commands["control"] = control_command()
    commands["resume"] = resume_command(state)
    return "\n".join([*lines, *(f"  {name:10}{command}" for name, command in commands.items())])


def adversary_summary(run: Path, state: TrainingState) -> str:
    """What the controller did, by its record: the last quarter of its intervals."""
    records = [json.loads(line) for line in (run / "policies.jsonl").read_text(encoding="utf-8").splitlines()]
    records = records[-max(1, len(records) // 4) :]
    if not records or not state.policies.largest_entropy:
        return "The controller has not been updated."
    counts = Counter(dict.fromkeys(state.config.ops, 0))
    counts.update(
        name for record in records for policy in record["policies"] for subpolicy in policy for name, *_ in subpolicy
    )
    last = records[-1]
    return verdict(last["entropy"] / state.policies.largest_entropy, counts, last.get("entropy_floor", 0.0))


def interruption(stop: Stopped, state: TrainingState) -> KeyboardInterrupt:
    """What ends the process after a stop request, with how far the run has come and how to continue."""
    done = f"step {state.step} of epoch {state.epoch + 1}" if state.step else f"epoch {state.epoch}"
    kind = KeyboardInterrupt if stop.signum == signal.SIGINT else Terminated
    return kind(f"{done} is saved; continue with: {resume_command(state)}")


def resume_command(state: TrainingState) -> str:
    """The command of this run, with --resume."""
    if state.world.in_group:
        without = ", without --stop_epoch" if any(word.startswith("--stop_epoch") for word in sys.argv) else ""
        return f"the same command and --resume{without}"
    return in_shell("main.py", *_arguments_without(START_FLAGS, "--stop_epoch"), "--resume")


def control_command() -> str:
    """The command of this run, with random policies."""
    words = _arguments_without(START_FLAGS, "--stop_epoch", "--name")
    conf = Path(words[words.index("--load_conf") + 1] if "--load_conf" in words else DEFAULT_CONF).stem
    return in_shell("main.py", *words, "--name", f"{conf}_random", "--set", "policy=random")


def _arguments_without(flags: Sequence[str], *with_value: str) -> list[str]:
    """The arguments of this command, without some flags, and without some others and their values."""
    words, skip = [], 0
    for word in sys.argv[1:]:
        if word in with_value:
            skip = 2
        if skip == 0 and word not in flags and not word.startswith(tuple(f"{flag}=" for flag in with_value)):
            words.append(word)
        skip = max(0, skip - 1)
    return words


def in_shell(script: str, *arguments: str) -> str:
    """The command that runs a script of this project from the directory where this one was started."""
    return shlex.join(["python", str(Path(sys.argv[0]).parent / script), *arguments])
