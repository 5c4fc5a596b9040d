"""User errors, the command line, files that are read with care and written atomically, seeding, devices."""

import argparse
import contextlib
import difflib
import hashlib
import os
import pickle
import platform
import re
import reprlib
import shlex
import shutil
import stat
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch


class UserError(Exception):
    """A mistake that the user can fix: one or two lines that say what, where and the remedy."""


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors that suggest what was meant. settings: names that --set takes."""

    settings: Sequence[str] = ()

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if "--" in words:
            following = words[words.index("--") + 1 :]
            flag = f"--{following[0]}" if following else ""
            guess = f"; did you mean {flag}?" if flag in self._option_string_actions else ""
            self.error(f"'--' is not the name of an argument{guess}")
        known, unknown = self.parse_known_args(words, namespace)
        if unknown:
            flag, _, value = unknown[0].partition("=")
            setting = flag.removeprefix("--").replace("-", "_")
            if f"--{setting}" not in self._option_string_actions and setting in self.settings:
                value = value or (unknown[1] if len(unknown) > 1 else "...")
                self.error(f"{flag}: {setting} is a setting: --set {setting}={printable(value, 80)}")
            guess = did_you_mean(f"--{setting}", self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{guess or did_you_mean(setting, self.settings)}")
        return known

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the arguments)")


def did_you_mean(word: Any, known: Iterable[str]) -> str:
    """A suggestion to append to an error message; empty if no known word is close."""
    spelled = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), spelled, n=1) if isinstance(word, str) else []
    return f"; did you mean {spelled[close[0]]}?" if close else ""


def printable(text: str, most: int = 240) -> str:
    """Text from a file or a user for a message: one line, cut where it is long, without control characters."""
    text = text if len(text) <= most else f"{text[: most - 3]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def require_file(path: Path) -> None:
    """Raises OSError for a link to nowhere, a folder, and a pipe or a device, which could be read for ever."""
    if path.is_symlink() and not path.exists():
        raise OSError(f"is a link to {os.readlink(path)}, which is not there")
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
    """repr() for a message: one short line, whatever the value is."""
    return printable(_Shown().repr(value), 160)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a value read from a file has this form.

    shape: a type or a tuple of types, a list with the shape of all items, or a dict with the shapes of required keys.
    """
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and has_shape(value[k], of) for k, of in shape.items())
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)


def load_tensors(path: Path) -> Any:
    """A file of torch.save with tensors and plain values only; nothing in it is executed. Raises UserError."""
    return load_hashed(path)[0]


def load_hashed(path: Path) -> tuple[Any, str]:
    """As `load_tensors`, and the file's SHA-256 in hex, from the same open file."""
    try:
        require_file(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            # torch.save does not compress: a file that claims more than its size could fill the memory
            entries = zipfile.ZipFile(file).infolist() if zipfile.is_zipfile(file) else []
            names = [entry.filename for entry in entries]
            if any(name.endswith("/constants.pkl") for name in names):
                raise ValueError("TorchScript")
            if names and not any(name.endswith("data.pkl") for name in names):
                raise ValueError("it is a zip archive of other files; unpack it, and name the file in it")
            if sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size:
                raise ValueError("it claims to hold more than its own size")
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # from torch, about files that it then refuses
                return torch.load(file, map_location="cpu", weights_only=True), sha256
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # damage has many forms: RuntimeError, EOFError, UnpicklingError, KeyError, ...
        text, reason, remedy = str(error), first_line(error)[:160], ""
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:  # torch says how to execute it
            reason = "it is damaged, or holds more than tensors and plain values: do not trust it then"
        besides = ["a TorchScript program"] if "TorchScript" in text else re.findall(r"GLOBAL (\S+) was not", text)
        if besides:
            reason = f"it holds {printable(besides[0], 80)}, and more than tensors and plain values may run code"
            remedy = "\nif it is yours, save the weights alone where it was made: torch.save(model.state_dict(), FILE)"
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}){remedy}") from None


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a file for `load_tensors` atomically."""
    write_atomically(path, lambda new: write_tensors(content, new), needs=size_of(content))


def size_of(state: Any) -> int:
    """Bytes of all tensors in a nested state."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(size_of, items))


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 atomically; what is not Unicode, as in names of files, as escapes."""
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_atomically(
    path: Path, write: Callable[[Path], Any], name: Callable[[Path], Path] | None = None, needs: int = 0
) -> Path:
    """Call write(temporary path), flush to disk, and rename in one step to `path`, or to name(temporary path).

    needs: size in bytes, for the message, if known. Raises UserError if the disk is full or not writable; the file
    that was there before is then unchanged.
    """
    temporary = path.with_name(f"{path.name}.part")
    try:
        write(temporary)
        _flush_to_disk(temporary, os.O_RDWR)  # Windows refuses to flush what is open for reading only
        final = name(temporary) if name else path
        temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save wraps OSErrors
        if not isinstance(cause, OSError):
            raise
        raise UserError(f"{path.parent}: {cannot_write(path.parent, cause, needs)}") from None
    with contextlib.suppress(OSError):  # not every file system can do it for a folder
        _flush_to_disk(final.parent, os.O_RDONLY)
    return final


def cannot_write(folder: Path, error: OSError, needs: int = 0) -> str:
    """The message for a file in `folder` that cannot be written."""
    reason = [error.strerror or first_line(error), *([f"{needs / 1e6:,.1f} MB are needed"] if needs else [])]
    with contextlib.suppress(OSError):
        reason.append(f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free")
    return f"cannot be written to ({', '.join(reason)}); make room or fix its permissions; earlier files are unharmed"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch.save hides why it cannot write
        torch.save(content, file)


def _flush_to_disk(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
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
    """A CPU generator seeded by the key, so that no draw depends on earlier ones."""
    return torch.Generator().manual_seed(keyed_seed(*key))


def choose_kernels(device: torch.device, deterministic: bool, tf32: bool) -> None:
    """On CUDA, use kernels that give the same bits each time, or the fastest; on the CPU all give the same bits.

    tf32: multiply float32 numbers with 10 bits of mantissa, on GPUs that can.
    """
    torch.backends.cudnn.benchmark = device.type == "cuda" and not deterministic
    if device.type == "cuda":
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def seed_default_generators(devices: Sequence[torch.device], *key: Any) -> None:
    """Seed the generators that networks draw from, each device's differently."""
    torch.manual_seed(keyed_seed(*key))
    for device in devices[1:]:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(keyed_seed(*key, device.index))


def random_state(devices: Sequence[torch.device]) -> dict[str, Any]:
    """State of the default generators, for `set_random_state`."""
    return {"cpu": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"]}


def set_random_state(state: dict[str, Any], devices: Sequence[torch.device]) -> None:
    torch.set_rng_state(state["cpu"])
    for device, of_device in zip((d for d in devices if d.type == "cuda"), state["cuda"], strict=False):
        torch.cuda.set_rng_state(of_device, device)


def environment(device: torch.device, packages: Iterable[str] = ("torch", "torchvision", "numpy", "pillow")) -> dict:
    """What a result depends on besides the settings: versions, device, threads, git revision, command."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: metadata.version(package) for package in packages},
        "device": gpu or f"{device.type} {platform.machine()}",
        "processes": int(os.environ.get("WORLD_SIZE") or 1),
        "threads": torch.get_num_threads(),
        "git_revision": _git_revision(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _git_revision() -> str | None:
    """Revision of the source, with '+' if files differ from it; outside a checkout GIT_REVISION, or None."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_REVISION")
