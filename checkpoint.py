"""Files that carry a run on: written whole or not at all, named by their own hash, and loaded without running code."""

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils import UserError, in_a_line

CONTENT = frozenset({"epoch", "model", "optimizer", "policies", "positions", "data", "ranks"})


def save_checkpoint(folder: Path, epoch: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write the state after `epoch` finished epochs; older files beyond the newest `keep` are deleted.

    The name is epoch-NNNN-<first 16 hex digits of the SHA-256>.pt, so that the hash travels with a copy.
    """
    folder.mkdir(exist_ok=True)
    path = write_atomically(
        folder / "new",
        lambda new: torch.save(state, new),
        name=lambda new: folder / f"epoch-{epoch:04d}-{sha256_of(new)[:16]}.pt",
    )
    for old in _newest_first(folder)[keep:]:
        old.unlink()
    return path


def load_newest_checkpoint(folder: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint whose hash is right; damaged newer ones are named by `warn` and passed over, not deleted.

    None where none has been written yet. Raises UserError when all are damaged.
    """
    files = _newest_first(folder)
    for path in files:
        if sha256_of(path)[:16] == path.stem.rsplit("-", 1)[1]:
            content = load_tensors(path)
            if isinstance(content, dict) and content.keys() >= CONTENT:
                return content
            raise UserError(f"{path}: is no checkpoint of a run, or of another version of this program; move it away")
        warn(f"{path}: is damaged (its content does not match the hash in its name); trying the one before")
    if files:
        raise UserError(
            f"{folder}: all {len(files)} checkpoints are damaged; put a copy back, or start anew with --overwrite"
        )
    return None


def load_tensors(path: Path) -> Any:
    """A file written by torch.save that holds tensors and plain values only; nothing in it is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # damage shows in many ways: RuntimeError, EOFError, UnpicklingError, KeyError, ...
        raise UserError(f"{path}: cannot be read as a checkpoint ({in_a_line(error)[:160]})") from None


def write_atomically(path: Path, write: Callable[[Path], Any], name: Callable[[Path], Path] | None = None) -> Path:
    """Call write(temporary path), flush to disk, and rename in one step to `path`, or to name(temporary path)."""
    temporary = path.with_name(f"{path.name}.part")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        final = name(temporary) if name else path
        temporary.replace(final)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save reports a full disk as RuntimeError
            raise
        raise UserError(f"{path.parent}: cannot be written to ({error}); what was saved before is whole") from None
    return final


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, whole or not at all."""
    write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _newest_first(folder: Path) -> list[Path]:
    files = [p for p in folder.glob("*.pt") if p.is_file() and re.fullmatch(r"epoch-\d+-[0-9a-f]{16}", p.stem)]
    return sorted(files, key=lambda p: int(p.stem.split("-")[1]), reverse=True)
