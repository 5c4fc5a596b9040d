"""One writer at a time for a run directory or a results file.

A lock is a file that holds the process and host of its owner and is locked by the system for as long as that process
lives, so that a file left behind by a killed process does not block the next one. On a file system without locks
there is only a warning: a second writer is rare, and refusing would make such a file system unusable.
"""

import contextlib
import errno
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from utils import UserError, warn

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

RUN_LOCK = "run.lock"  # inside the directory it locks; the lock of a file is next to the file
_held: set[tuple[int, Path]] = set()  # (process, lock file): the system does not refuse a process its own lock


@contextlib.contextmanager
def sole_writer(target: Path, remedy: str) -> Iterator[None]:
    """Lock `target`, an existing directory or a file, against other writers.

    remedy: what to do instead of waiting, for the message. Forked children neither keep nor release the lock. Raises
    UserError if another process holds the lock or the lock file cannot be written.
    """
    path = target / RUN_LOCK if target.is_dir() else target.with_name(f"{target.name}.lock")
    process = os.getpid()
    entry = process, path.parent.resolve() / path.name
    if entry in _held:
        raise _refusal(target, _this_process(), remedy)
    try:
        descriptor = _acquire(path, target, remedy)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None
    _held.add(entry)
    try:
        yield
    finally:
        _held.discard(entry)
        if os.getpid() == process and _is_file(path, descriptor):
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, target: Path, remedy: str) -> int:
    """Open, lock and sign the lock file. Returns its descriptor."""
    while True:
        # No links: their target would be overwritten.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(descriptor, path, target, remedy)
            if _is_file(path, descriptor):
                line = f"{_this_process()}\n".encode()
                os.ftruncate(descriptor, os.write(descriptor, line))
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last owner removed the file after it was opened here


def _lock(descriptor: int, path: Path, target: Path, remedy: str) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warn(f"{path}: cannot be locked ({error.strerror}); make sure that no other process writes here")
            return
        owner = os.read(descriptor, 1000).decode(errors="replace").removesuffix("\n")
        known = re.fullmatch(r"process \d+ on \S+", owner)
        raise _refusal(target, owner if known else "another process", remedy) from None


def _refusal(target: Path, owner: str, remedy: str) -> UserError:
    return UserError(f"{target}: is being written by {owner}\nwait for it to end, stop it, or {remedy}")


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _is_file(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False
