"""Files that carry a run on: written whole or not at all, named by their own hash, and loaded without running code."""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils import UserError, has_shape, in_a_line, require_file

CONTENT = {
    "epoch": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict, "policies": dict, "so_far": dict,
    "positions": dict, "data": str, "ranks": [{"devices": int}],
}  # fmt: skip
NAME = re.compile(r"epoch-(\d+)-step-(\d+)-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The exact states of a run, in a folder of their own.

    A file is named epoch-EEEE-step-SSSSSS-<first 16 hex digits of the SHA-256>.pt, by the finished epochs and the steps
    of the next one, so that the hash travels with a copy. The newest two are kept, and the newest from between two
    epochs. Only files that this object has written or found whole are ever deleted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._whole: list[Path] = []  # oldest first

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state, and delete those that it makes superfluous.

        Raises UserError, with every other file as it was, where it cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be made ({error.strerror})") from None
        stem = f"epoch-{state['epoch']:04d}-step-{state['step']:06d}"
        path = write_atomically(
            self.folder / "new",
            lambda new: _write_tensors(state, new),
            name=lambda new: self.folder / f"{stem}-{sha256_of(new)[:16]}.pt",
            needs=size_of(state),
        )
        # Those of as many steps or more belong to a run that has gone back behind them.
        before = [file for file in self._whole if _position(file) < _position(path)]
        between_epochs = [file for file in (*before, path) if not _position(file)[1]]
        kept = [file for file in before if file in (*before[-1:], *between_epochs[-1:])]
        for file in self._whole:
            if file not in (*kept, path):
                file.unlink(missing_ok=True)
        self._whole = [*kept, path]
        return path

    def load_newest(self, warn: Callable[[str], None], *, between_epochs: bool = False) -> dict[str, Any] | None:
        """The newest state whose hash is right; damaged newer ones are named by `warn` and passed over, never deleted.

        None where none has been written yet. between_epochs: only those with no epoch under way count. Raises UserError
        when all are damaged.
        """
        files = [file for file in self.folder.glob("*.pt") if NAME.fullmatch(file.name) and file.is_file()]
        files.sort(key=lambda file: (_position(file), file.stat().st_mtime_ns))
        whole = [file for file in files if sha256_of(file)[:16] == NAME.fullmatch(file.name)[3]]
        usable = [file for file in whole if not between_epochs or not _position(file)[1]]
        if files and not usable:
            kind = " from between two epochs" if between_epochs else ""
            raise UserError(
                f"{self.folder}: none of the {len(files)} checkpoints{kind} is whole; put a copy back, or start anew "
                "with --overwrite"
            )
        if not files:
            return None
        for file in reversed(files[files.index(usable[-1]) :]):
            if file not in whole:
                warn(f"{file}: is damaged (its content does not match the hash in its name); trying the one before")
        content = load_tensors(usable[-1])
        if not has_shape(content, CONTENT) or not content["ranks"]:
            raise UserError(
                f"{usable[-1]}: is no checkpoint of a run, or of another version of this program; move it away"
            )
        self._whole = whole
        return content


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
        reason = in_a_line(error)[:160]
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):  # torch's words say how to run it
            reason = "it is damaged, or holds more than tensors and plain values: do not trust it then"
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason})") from None


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write a file for `load_tensors`, whole or not at all."""
    write_atomically(path, lambda new: _write_tensors(content, new), needs=size_of(content))


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
    reason = [error.strerror or in_a_line(error)]
    reason += [f"{needs / 1e6:,.1f} MB are needed"] if needs else []
    with contextlib.suppress(OSError):
        reason.append(f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free")
    return f"cannot be written to ({', '.join(reason)}); make room or mend its permissions; what was saved is whole"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_tensors(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch.save would not say why it cannot write
        torch.save(content, file)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _position(file: Path) -> tuple[int, int]:
    """Finished epochs, and steps of the next one."""
    epochs, steps, _ = NAME.fullmatch(file.name).groups()
    return int(epochs), int(steps)
