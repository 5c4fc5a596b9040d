"""Checkpoint files: written atomically, named by their hash, and loaded without running code."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils import UserError, has_shape, load_tensors, sha256_of, size_of, write_atomically, write_tensors

CONTENT = {
    "epoch": int, "step": int, "model": dict, "optimizer": dict, "scaler": dict, "policies": dict, "epoch_totals": dict,
    "positions": dict, "data": str, "ranks": [{"devices": int}],
}  # fmt: skip
NAME = re.compile(r"epoch-(\d+)-step-(\d+)-([0-9a-f]{16})\.pt")


class Checkpoints:
    """The states of a run, in their own folder.

    A file is named epoch-EEEE-step-SSSSSS-<first 16 hex digits of its SHA-256>.pt, for the finished epochs and the
    steps of the next one. The newest two are kept, and the newest of the end of an epoch. Only files that this object
    has written or verified are ever deleted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._verified: list[Path] = []  # oldest first

    def save(self, state: dict[str, Any]) -> Path:
        """Write a state, and delete the files that are no longer kept.

        Raises UserError, without changing any other file, if it cannot be written.
        """
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be created ({error.strerror})") from None
        stem = f"epoch-{state['epoch']:04d}-step-{state['step']:06d}"
        path = write_atomically(
            self.folder / "new",
            lambda new: write_tensors(state, new),
            name=lambda new: self.folder / f"{stem}-{sha256_of(new)[:16]}.pt",
            needs=size_of(state),
        )
        # Files of as many steps or more are left from before the run went back to an earlier one.
        before = [file for file in self._verified if _position(file) < _position(path)]
        between_epochs = [file for file in (*before, path) if not _position(file)[1]]
        kept = [file for file in before if file in (*before[-1:], *between_epochs[-1:])]
        for file in self._verified:
            if file not in (*kept, path):
                file.unlink(missing_ok=True)
        self._verified = [*kept, path]
        return path

    def load_newest(self, warn: Callable[[str], None], *, between_epochs: bool = False) -> dict[str, Any] | None:
        """The newest state whose hash is right; damaged newer files are skipped with a warning, never deleted.

        None if there are no files. between_epochs: skip the files from the middle of an epoch. Raises UserError if all
        are damaged.
        """
        files = [file for file in self.folder.glob("*.pt") if NAME.fullmatch(file.name) and file.is_file()]
        files.sort(key=lambda file: (_position(file), file.stat().st_mtime_ns))
        verified = [file for file in files if sha256_of(file)[:16] == NAME.fullmatch(file.name)[3]]
        usable = [file for file in verified if not between_epochs or not _position(file)[1]]
        if files and not usable:
            kind = " of the end of an epoch" if between_epochs else ""
            raise UserError(
                f"{self.folder}: none of the {len(files)} checkpoints{kind} is intact; restore a copy, or start from "
                "scratch with --overwrite"
            )
        if not files:
            return None
        for file in reversed(files[files.index(usable[-1]) :]):
            if file not in verified:
                warn(f"{file}: is damaged (its content does not match the hash in its name); trying the previous one")
        content = load_tensors(usable[-1])
        if not has_shape(content, CONTENT) or not content["ranks"]:
            raise UserError(
                f"{usable[-1]}: is not a checkpoint, or one of another version of this program; move it away"
            )
        self._verified = verified
        return content


def _position(file: Path) -> tuple[int, int]:
    """Finished epochs, and steps of the next one."""
    epochs, steps, _ = NAME.fullmatch(file.name).groups()
    return int(epochs), int(steps)
