"""One writer at a time: a run's directory or a results.json has a lock, and the others are told whom it belongs to.

A lock is a file that names its holder, and that the system keeps locked for as long as that process lives: what a
killed one leaves behind hinders nobody. Where a file system has no locks, the process that is named is looked for.
"""

import contextlib
import errno
import os
import re
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from utils import UserError, warn

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

RUN_LOCK = "run.lock"  # in the directory that it is for; the lock of a file lies beside it
_held: set[tuple[int, Path]] = set()  # processes with the lock files that they hold


@contextlib.contextmanager
def sole_writer(target: Path, remedy: str) -> Iterator[None]:
    """Nobody else is the writer of `target`, a directory that is there or a file, meanwhile.

    Raises UserError where somebody is, and where the lock cannot be written. remedy: what one can do but wait. Children
    that are forked meanwhile neither keep the lock nor end it.
    """
    path = target / RUN_LOCK if target.is_dir() else target.with_name(f"{target.name}.lock")
    own = Holder.this()
    lock, held = _Lock(path, target, remedy, own), (own.process, path.parent.resolve() / path.name)
    if held in _held:  # which the system would not refuse
        raise lock.refusal(own)
    _held.add(held)
    try:
        descriptor = lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                # Else this is a child; or somebody has removed the file, and what lies there now may be another's.
                if os.getpid() == own.process and _lies_at(path, descriptor):
                    path.unlink()
            os.close(descriptor)
    finally:
        _held.discard(held)


class Holder(NamedTuple):
    """A process, as its lock file names it. started: in the system's clock ticks, 0 where it does not tell."""

    process: int
    host: str
    started: int
    since: str  # when it took the lock

    @classmethod
    def this(cls) -> "Holder":
        _, started = _state_and_start(os.getpid()) or ("", 0)
        return cls(os.getpid(), socket.gethostname(), started, datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def read(cls, descriptor: int) -> "Holder | None":
        """None where the file does not name one: it is empty, or no lock of ours."""
        text = os.pread(descriptor, 1000, 0).decode(errors="replace")
        found = re.match(r"process ([1-9]\d{0,8}) on (\S+), started at tick (\d{1,20}), since (\S+)\n", text)
        return found and cls(int(found[1]), found[2], int(found[3]), found[4])

    def write(self, descriptor: int) -> None:
        line = f"process {self.process} on {self.host}, started at tick {self.started}, since {self.since}\n".encode()
        os.ftruncate(descriptor, os.pwrite(descriptor, line, 0))  # in this order: a reader finds a whole line

    def runs(self) -> bool:
        """Whether it is there, on this host, and its number has not been given to another."""
        if os.name != "posix":  # there is no harmless way to ask
            return True
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's
        state, started = _state_and_start(self.process) or ("R", self.started)
        return state not in "ZX" and started == self.started


@dataclass(frozen=True)
class _Lock:
    path: Path
    target: Path
    remedy: str
    own: Holder

    def acquire(self) -> int:
        """A descriptor of the lock file, which is this process's now and names it."""
        try:
            for _ in range(1000):
                if (descriptor := self._attempt()) is not None:
                    return descriptor
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror}); {self.remedy}") from None
        raise UserError(f"{self.path}: cannot be locked, it comes and goes; {self.remedy}")

    def refusal(self, holder: Holder | None) -> UserError:
        """holder: None where it is not known: it has not written its name yet."""
        return UserError(
            f"{self.target}: is being written by {_describe(holder)}\nwait for it to end, stop it, or {self.remedy}"
        )

    def _attempt(self) -> int | None:
        """None where the file has just been removed: there is a new one to try for."""
        flags = os.O_RDWR | getattr(os, "O_NONBLOCK", 0)  # a pipe of that name is not waited for
        try:
            descriptor, is_new = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            try:
                descriptor, is_new = os.open(self.path, flags), False
            except FileNotFoundError:
                return None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{self.path}: is no file; remove it, or {self.remedy}")
            taken = self._lock(descriptor, is_new)
            if taken:
                self.own.write(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if taken:
            return descriptor
        os.close(descriptor)
        return None

    def _lock(self, descriptor: int, is_new: bool) -> bool:
        """Whether the open file is this process's now, and still the one that others will open."""
        try:
            if fcntl is None:
                raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            before = Holder.read(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return is_new or self._inherit(descriptor, before)
            # One that has ended was the holder before: the present one has the lock, and not written its name yet.
            unnamed = before is not None and before.host == self.own.host and not before.runs()
            raise self.refusal(None if unnamed else before) from None
        if not _lies_at(self.path, descriptor):
            return False
        before = Holder.read(descriptor)
        if before and before.host == self.own.host and before.process != self.own.process:
            if before.started and before.runs():  # its lock has gone: it has opened and closed the file once more
                raise self.refusal(before)
        elif before and before.host != self.own.host:  # a file system may not tell one host of the other's locks
            warn(f"{self.path}: was left by {_describe(before)}; if that is not stopped yet, stop one of the two")
        return True

    def _inherit(self, descriptor: int, before: Holder | None) -> bool:
        """Without the system's locks: remove the file of a holder that has ended; False: there is a new one to make."""
        if before is None or before.host != self.own.host:
            whose = f"says {_describe(before)}" if before else "does not say which process"
            raise UserError(
                f"{self.path}: {whose} is writing there; if none is, remove the file\n"
                f"(locks do not work on this file system), or {self.remedy}"
            )
        if before.runs():
            raise self.refusal(before)
        aside = self.path.with_name(f"{self.path.name}.{self.own.process}")
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            self.path.rename(aside)
            if _lies_at(aside, descriptor):
                aside.unlink()
            else:  # it has even made its own lock by now: this one
                aside.rename(self.path)
        return False


def _describe(holder: Holder | None) -> str:
    return f"process {holder.process} on {holder.host} (since {holder.since})" if holder else "another process"


def _lies_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _state_and_start(process: int) -> tuple[str, int] | None:
    """Its state, as a letter (Z and X: it has ended), and when it started, in clock ticks; None where nobody tells."""
    try:
        text = Path(f"/proc/{process}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # after a name, which may hold anything
    return fields[0], int(fields[19])
