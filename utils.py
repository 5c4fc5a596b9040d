"""User errors and messages, the command line, atomic files, keyed randomness, devices: nothing of the science."""

import argparse
import contextlib
import ctypes
import difflib
import hashlib
import os
import pickle
import platform
import reprlib
import shlex
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


class UserError(Exception):
    """A mistake that the user can fix: one or two lines that say what, where and the remedy."""


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line with a guess at what was meant.

    settings: names that `--set` takes, if the command has it.
    """

    settings: Sequence[str] = ()

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
            flag, _, value = unknown[0].partition("=")
            if (setting := flag.removeprefix("--")) in self.settings:
                value = value or (unknown[1] if len(unknown) > 1 else "...")
                self.error(f"{flag}: settings are changed with --set {setting}={printable(value, 80)}")
            self.error(f"unknown argument {unknown[0]}{did_you_mean(flag, self._option_string_actions)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the arguments)")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A question to append to an error message, empty if nothing known is close."""
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelled, n=1) if isinstance(word, str) else []
    return f"; did you mean {spelled[close[0]]}?" if close else ""


def printable(text: str, most: int = 240) -> str:
    """Text from a file or a user for a message: one line, cut where it is long, without control characters."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def require_file(path: Path) -> None:
    """Raises OSError for a folder, and for a pipe or a device, which could be read for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("is no file")


def read_text(path: Path, longest: int) -> str:
    """A file's UTF-8 text. Raises OSError, also for more than `longest` bytes, and UnicodeDecodeError."""
    require_file(path)
    with path.open("rb") as file:
        data = file.read(longest + 1)
    if len(data) > longest:
        raise OSError(f"is longer than {longest} bytes")
    return data.decode("utf-8")


class _Shown(reprlib.Repr):
    """repr() of a few items on two levels, so that a list that contains itself ends."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 80, 80

    def repr_int(self, number: int, level: int) -> str:
        bits = number.bit_length()
        return repr(number) if bits < 200 else f"<{bits} bits>"  # Python refuses to print the longest

    def repr_instance(self, value: Any, level: int) -> str:
        kind = type(value)
        plain = kind.__module__ in ("builtins", "datetime")  # the repr of others may be of any length
        return super().repr_instance(value, level) if plain else f"<{kind.__name__}>"


def short_repr(value: Any) -> str:
    """repr() for a message: on one line and not long, whatever was in the file that the value comes from."""
    return printable(_Shown().repr(value), 160)


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


def load_tensors(path: Path) -> Any:
    """A file written by torch.save that holds tensors and plain values only; nothing in it is executed."""
    return load_hashed(path)[0]


def load_hashed(path: Path) -> tuple[Any, str]:
    """What `load_tensors` gives, and the SHA-256, in hex, of the very file that it was read from."""
    try:
        require_file(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    # torch.save packs nothing: what says that it holds more would fill the memory.
                    if sum(entry.file_size for entry in archive.infolist()) > os.fstat(file.fileno()).st_size:
                        raise ValueError("says that it holds more than it is long")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of torch, about files that it then refuses
                return torch.load(file, map_location="cpu", weights_only=True), sha256
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # damage shows in many ways: RuntimeError, EOFError, UnpicklingError, KeyError, ...
        reason = first_line(error)[:160]
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):  # torch's words say how to run it
            reason = "it is damaged, or holds more than tensors and plain values: do not trust it then"
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason})") from None


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a file for `load_tensors`, whole or not at all."""
    write_atomically(path, lambda new: write_tensors(content, new), needs=size_of(content))


def size_of(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, items))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))


def write_atomically(
    path: Path, write: Callable[[Path], Any], name: Callable[[Path], Path] | None = None, needs: int = 0
) -> Path:
    """Call write(temporary path), flush to disk, and rename in one step to `path`, or to name(temporary path).

    needs: bytes, as far as they are known, for the message. Raises UserError, with what was there before as it was,
    where the disk is full or cannot be written to.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        write(temporary)
        _flush_to_disk(temporary)
        final = name(temporary) if name else path
        temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # as torch.save reports what it meets
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path.parent}: {cannot_write(path.parent, cause, needs)}") from None
    with contextlib.suppress(OSError):  # not every file system knows it for a folder
        _flush_to_disk(final.parent)
    return final


def cannot_write(folder: Path, error: OSError, needs: int = 0) -> str:
    """Why a file in `folder` cannot be written, and what to do about it, in words."""
    reason = [error.strerror or first_line(error)]
    reason += [f"{needs / 1e6:,.1f} MB are needed"] if needs else []
    with contextlib.suppress(OSError):
        reason.append(f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free")
    return f"cannot be written to ({', '.join(reason)}); make room or fix its permissions; earlier files are unharmed"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch.save would not say why it cannot write
        torch.save(content, file)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
