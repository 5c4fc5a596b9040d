"""Files that carry a run on: written whole or not at all, named by their own hash, and loaded without running code."""

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
            lambda new: write_tensors(state, new),
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


def _position(file: Path) -> tuple[int, int]:
    """Finished epochs, and steps of the next one."""
    epochs, steps, _ = NAME.fullmatch(file.name).groups()
    return int(epochs), int(steps)
