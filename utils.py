"""Plumbing that names nothing of the science: messages, tables, the command line, keyed randomness, the environment."""

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import os
import platform
import re
import reprlib
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(Exception):
    """Something the user can mend: one or two lines that say what, where and the remedy."""


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line with a guess at what was meant."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if "--" in words:
            following = words[words.index("--") + 1 :]
            flag = f"--{following[0]}" if following else ""
            self.error(f"'--' stands alone{f'; did you mean {flag}?' if flag in self._option_string_actions else ''}")
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"unknown argument {unknown[0]}{did_you_mean(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the arguments)")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A question to append to an error message, empty if nothing known is close."""
    close = difflib.get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def one_line(text: str, most: int = 240) -> str:
    """Somebody else's text for a message: on one line, cut where it is long, and of no effect on a terminal."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def in_a_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def require_file(path: Path) -> None:
    """Raises OSError for what is no file, but a folder, or a pipe or a device, which may be read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("is no file")


class _Shown(reprlib.Repr):
    """A few of the items, and of their items: a list that holds itself, or others a billion times over, has an end."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, number: int, level: int) -> str:
        bits = number.bit_length()
        return repr(number) if bits < 200 else f"<{bits} bits>"  # Python refuses to print the longest

    def repr_instance(self, value: Any, level: int) -> str:
        kind = type(value)
        plain = kind.__module__ in ("builtins", "datetime")  # others may be as long as they like
        return super().repr_instance(value, level) if plain else f"<{kind.__name__}>"


def shown(value: Any) -> str:
    """repr() for a message: on one line and not long, whatever was in the file that the value comes from."""
    return one_line(_Shown().repr(value), 160)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a value read from a file is of this form.

    shape: a type or several, a list with the shape of all items, or a dict with those of the keys that must be there.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and has_shape(value[k], of) for k, of in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)


class Table(NamedTuple):
    """Rows of text under a header, with a title and remarks."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def render(table: Table, form: str = "table") -> str:
    """A table as aligned text or as Markdown."""
    if form == "markdown":
        lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
        return "\n".join([table.title, "", *lines, *(f"\n{note}" for note in table.notes)])
    columns = []
    for header, *cells in zip(table.header, *table.rows, strict=True):
        width = max(map(len, (header, *cells)))
        of_numbers = all(re.fullmatch(r"[-+.,\d ]*", cell) for cell in cells)
        columns.append([cell.rjust(width) if of_numbers else cell.ljust(width) for cell in (header, *cells)])
    lines = ("  ".join(row).rstrip() for row in zip(*columns, strict=True))
    return "\n".join([table.title, "", *lines, *table.notes])


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def keyed_seed(*key: Any) -> int:
    """A seed that is a function of the key alone: keyed_seed(seed, "crop", epoch, step)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4], "little")


def keyed_generator(*key: Any) -> torch.Generator:
    """A CPU generator seeded by the key, so that no draw depends on which draws came before it."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def choose_kernels(device: torch.device, deterministic: bool, tf32: bool) -> None:
    """On CUDA, kernels that give the same bits each time, or the fastest; on the CPU they always do.

    tf32: products of float32 numbers with 10 bits of mantissa each, on the GPUs that can.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, for what it allocates next. Without effect where no glibc is.

    Otherwise every large tensor of a step on the CPU is made of new pages, which the system clears one by one.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older glibc takes 32 MB at most. One that took neither would be left with its smallest threshold.
        if any(mallopt(M_MMAP_THRESHOLD, size) for size in (2**30, 2**25)):
            mallopt(M_TRIM_THRESHOLD, -1)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """On CUDA, float32 with all its bits, and the same ones each time, whatever was chosen for training."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def seed_default_generators(devices: Sequence[torch.device], *key: Any) -> None:
    """Seed the generators that networks draw from: by the key, and apart for each device."""
    torch.manual_seed(keyed_seed(*key))
    for device in devices[1:]:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(keyed_seed(*key, device.index))


def random_state(devices: Sequence[torch.device]) -> dict[str, Any]:
    """State of the default generators, to be put back by `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"]}


def set_random_state(state: dict[str, Any], devices: Sequence[torch.device]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, of_device in zip((d for d in devices if d.type == "cuda"), state["cuda"], strict=False):
        torch.cuda.set_rng_state(of_device, device)


def environment(device: torch.device, packages: Iterable[str] = ("torch", "torchvision", "numpy", "pillow")) -> dict:
    """What a result depends on besides its settings: versions, device, threads, git revision, command."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} {platform.machine()}",
        "processes": int(os.environ.get("WORLD_SIZE") or 1),
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _git_revision() -> str | None:
    """Revision of the source, with '+' appended if files differ from it; outside a checkout GIT_REVISION, or None."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        revision = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        ).stdout
        return revision + ("+" if changes.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_REVISION")
