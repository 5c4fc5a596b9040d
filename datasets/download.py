"""Files from public addresses or a mirror: fetched whole, unpacked with care, and known again by their hashes."""

import contextlib
import functools
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils import UserError, warn, write_atomically

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

STALL = 60.0  # seconds without a byte after which a connection is given up
PAUSES = (1.0, 4.0, 16.0)  # seconds before each new try; after as many tries that gained nothing, the last has failed
CHUNK = 1 << 20  # bytes
_held: set[tuple[int, Path]] = set()  # threads with the folders that each has for itself
ADDRESS = re.compile(r"https?://[\w.-]+(:\d+)?(/.*)?|file://(localhost)?/.*")


class Missing(UserError):
    """Something is not there, and may not or cannot be fetched."""


@dataclass(frozen=True)
class Remote:
    """A file with a public address. size in bytes, hashes in hex: None where none is published."""

    url: str
    size: int | None = None
    md5: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


@dataclass(frozen=True)
class Downloads:
    """How files are fetched: from where, whether at all, and whether with a bar and warnings.

    Raises UserError for a mirror whose address is none of http://, https:// and file://.
    """

    mirror: str | None = None  # --data-url: a folder's address, instead of the public ones, with files of these names
    allowed: bool = True  # False: --no-download
    quiet: bool = False
    only_checkpoint: bool = False  # only a checkpoint names the folder: nothing is downloaded or unpacked there

    def __post_init__(self):
        if self.mirror is not None and not ADDRESS.fullmatch(self.mirror):
            raise UserError(
                f"--data-url {self.mirror}: is no address of a folder (http://..., https://... or file:///...)"
            )

    def fetch(self, remote: Remote, folder: Path) -> Path:
        """folder / remote.name, whole and with the published size and hash; what is there already is checked only.

        What has come before a failure or Ctrl-C stays in <name>.part, and a later call carries on from there. Raises
        Missing when it is not there and may not or cannot be fetched, as on a full disk or into a folder that cannot be
        written to, and UserError when what is there is wrong.
        """
        path = folder / remote.name
        if self.only_checkpoint and (".tar" in remote.name or not path.exists()):
            self._refuse(folder, f"the content of {remote.name}" if ".tar" in remote.name else remote.name)
        try:
            if not path.exists():
                if not self.allowed:
                    raise Missing(f"{path}: is not there\n{_by_hand(remote, folder)} run without --no-download")
                folder.mkdir(parents=True, exist_ok=True)
                with _alone(folder):
                    if not path.exists():  # nor has another process fetched it meanwhile
                        return self._download(remote, path)
            if fault := _fault(path, remote):
                raise UserError(f"{path}: {fault}; remove it to have it fetched anew, or put a right copy there")
        except OSError as error:
            raise Missing(_unusable(folder, error)) from None
        except KeyboardInterrupt as stop:
            kept = f"what has come of {remote.name} is kept; the same command carries on from there"
            raise type(stop)(kept) from None
        return path

    def fetch_unpacked(self, archive: Remote, folder: Path, holds: Sequence[str]) -> list[Path]:
        """The folders that `archive` holds, in `folder`: fetched and unpacked where one is missing.

        An archive that was fetched for it is removed again, also when the process that has fetched it was killed; one
        that lay there is kept. Raises what `fetch` and `unpack` raise, and UserError when the archive does not hold
        them.
        """
        folders, path = [folder / name for name in holds], folder / archive.name
        fetched = folder / f".fetched-{archive.name}"  # is there as long as an archive is that is to be removed
        missing = [path.name for path in folders if not path.is_dir()]
        if self.only_checkpoint and missing:
            self._refuse(folder, f"{missing[0]} of {archive.name}")
        if missing or (fetched.exists() and not self.only_checkpoint):
            try:
                with _alone(folder) if self.allowed else contextlib.nullcontext():
                    # Another process may have unpacked and removed the archive while this one waited.
                    if not all(path.is_dir() for path in folders):
                        lay_there = path.exists()
                        self.fetch(archive, folder)
                        if not lay_there:
                            fetched.touch()
                        unpack(path, folder, quiet=self.quiet)
                    with contextlib.suppress(OSError):
                        fetched.unlink()
                        path.unlink()
            except OSError as error:
                raise Missing(_unusable(folder, error)) from None
        for path in folders:
            if not path.is_dir():
                raise UserError(f"{folder / archive.name}: does not hold {path.name}")
        return folders

    def _refuse(self, folder: Path, what: str) -> None:
        raise Missing(
            f"{folder}: lacks {what}; nothing is downloaded there because only the checkpoint names it\n"
            "say where the data are, or may be downloaded to, with --dataroot DIR"
        )

    def _download(self, remote: Remote, path: Path) -> Path:
        url, part = self._address(remote), path.with_name(f"{path.name}.part")
        remedy = f"{_by_hand(remote, path.parent)} name a mirror with --data-url"
        part.touch()
        begun = furthest = part.stat().st_size
        tries, resolved = 0, False
        while True:
            try:
                _receive(url, part, remote, self.quiet)
                break
            except _Failure as failure:
                size = part.stat().st_size
                furthest, tries = max(size, furthest), 0 if size > furthest else tries
                resolved |= failure.resolved
                # A name that nobody knows is likely to be a wrong one, or there is no network at all.
                if not failure.passes or tries == (len(PAUSES) if resolved else 1):
                    if size == 0:
                        part.unlink()
                    raise Missing(f"{url}: {failure}\n{remedy}") from None
                if not self.quiet:
                    warn(f"{url}: {failure}; trying again in {PAUSES[tries]:g} s")
                time.sleep(PAUSES[tries])
                tries += 1
        if fault := _fault(part, remote):
            part.unlink()
            if begun:  # by an earlier run, of another version or from another mirror
                if not self.quiet:
                    warn(f"{part}: was not the beginning of {url}; fetching it anew")
                return self._download(remote, path)
            raise Missing(f"{url}: what came from there {fault}\n{remedy}")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        return part.replace(path)

    def _address(self, remote: Remote) -> str:
        if self.mirror is None:
            return remote.url
        parts = urlsplit(self.mirror)
        path = f"{quote(parts.path.rstrip('/'), safe='/%')}/{quote(remote.name)}"
        return urlunsplit(parts._replace(path=path))


def _by_hand(remote: Remote, folder: Path) -> str:
    return f"fetch {remote.url} by hand and put it into {folder}, or"


def _unusable(folder: Path, error: OSError) -> str:
    return f"{folder}: cannot be read or written ({error}); make room, mend its permissions or use another folder"


class _Failure(Exception):
    """Why a server did not deliver, and whether that may pass. resolved: its name is known."""

    def __init__(self, reason: str, *, passes: bool, status: int | None = None, resolved: bool = True):
        super().__init__(reason)
        self.passes, self.status, self.resolved = passes, status, resolved


@contextlib.contextmanager
def _network(url: str) -> Iterator[None]:
    """Tells what goes wrong in between, as a _Failure, from what goes wrong on this machine's disk."""
    try:
        yield
    except HTTPError as error:
        error.close()
        passes = error.code >= 500 or error.code in (408, 429)
        raise _Failure(f"{error.code} {error.reason}", passes=passes, status=error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)  # URLError wraps what happened
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        # A ValueError is of an address that is none, or of a certificate that is not valid.
        passes = not url.startswith("file:") and not isinstance(cause, ValueError)
        raise _Failure(reason, passes=passes, resolved=not isinstance(cause, socket.gaierror)) from None


def _receive(url: str, part: Path, remote: Remote, quiet: bool) -> None:
    """Append to `part` what it lacks; where the server does not continue it, it starts over. Raises _Failure."""
    with part.open("ab") as file:
        size = file.tell()
        headers = {"User-Agent": "adversarial-autoaugment"} | ({"Range": f"bytes={size}-"} if size else {})
        try:
            with _network(url):
                response = urlopen(Request(url, headers=headers), timeout=STALL)
        except _Failure as failure:
            if failure.status != 416 or not size:
                raise
            if (remote.size or remote.md5) and not _fault(part, remote):
                return
            file.truncate(0)
            return _receive(url, part, remote, quiet)
        with response:
            if response.status == 206:
                given = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
                if not given or int(given[1]) != size:
                    file.truncate(0)
                    raise _Failure("sent another range than was asked for", passes=True)
                total = int(given[2])
            else:
                length = response.headers.get("Content-Length", "")
                size, total = 0, int(length) if length.isdecimal() else None
            if None not in (total, remote.size) and total != remote.size:
                raise _Failure(f"would send {total} bytes instead of {remote.size}", passes=False)
            file.truncate(size)
            with _bar(remote.name, total or remote.size, quiet, size) as bar:
                while total is None or size < total:
                    with _network(url):
                        chunk = response.read1(CHUNK if total is None else min(CHUNK, total - size))
                    if not chunk:
                        break
                    file.write(chunk)
                    size += len(chunk)
                    bar.update(len(chunk))
    if size < (whole := total or remote.size or 0):
        raise _Failure(f"the connection was cut after {size} of {whole} bytes", passes=True)


def _fault(path: Path, remote: Remote) -> str:
    """How a file differs from the published one, in words; empty where it does not."""
    if remote.size is not None and (size := path.stat().st_size) != remote.size:
        return f"has {size} bytes instead of {remote.size}"
    if remote.md5 is not None and (md5 := _hashes(path)["md5"]) != remote.md5:
        return f"has md5 {md5} instead of {remote.md5}"
    return ""


def _bar(doing: str, total: int | None, quiet: bool, done: int = 0) -> tqdm:
    hidden = True if quiet else None  # None: where stderr is no terminal
    return tqdm(desc=doing, total=total, initial=done, unit="B", unit_scale=True, disable=hidden, leave=False)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Others that would fetch into `folder` wait, if its file system tells them (that of a network may not)."""
    held = (threading.get_ident(), folder)
    if fcntl is None or held in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    _held.add(held)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warn(f"{folder}: waiting for another process that is fetching or unpacking there")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        _held.discard(held)
        os.close(descriptor)


def unpack(archive: Path, folder: Path, quiet: bool = False) -> None:
    """Put the content of a tar archive, packed or not, into `folder`: all of it, or nothing where it is bad.

    Files that are there already are replaced. Raises UserError for an archive that is damaged, holds anything but plain
    files and folders below its own top, or needs more room than there is; and for a folder that cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder), archive.open("rb") as file:
            temporary = folder / f".unpacking-{archive.name}"
            if temporary.exists():
                shutil.rmtree(temporary)
            try:
                _unpack(file, archive, temporary, quiet)
                _move(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, ValueError, tarfile.TarError) as error:
        remedy = "make room, or remove what stands in the way"
        raise UserError(f"{folder}: {archive.name} cannot be unpacked there ({error}); {remedy}") from None


def _unpack(file: BinaryIO, archive: Path, folder: Path, quiet: bool) -> None:
    size = archive.stat().st_size
    try:
        tar = tarfile.open(fileobj=file, tarinfo=_Member)  # noqa: SIM115 (holds nothing open but `file`)
        with _bar(f"checking {archive.name}", size, quiet) as bar:
            folders, members = _plain_members(tar, archive, lambda: bar.update(file.tell() - bar.n))
    except UserError:
        raise
    except Exception:  # damage shows in many ways: TarError, EOFError, zlib.error, OSError, ValueError, ...
        raise UserError(f"{archive}: is cut short, damaged or no tar archive; remove it and fetch it anew") from None
    needed, free = sum(member.size for member in members.values()), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(f"{folder.parent}: {archive.name} needs {needed} bytes there, and {free} are free; make room")
    for path in folders:
        (folder / path).mkdir(parents=True, exist_ok=True)
    with _bar(f"unpacking {archive.name}", size, quiet) as bar:
        for path, member in members.items():
            with tar.extractfile(member) as source, (folder / path).open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK)
            bar.update(file.tell() - bar.n)


class _Member(tarfile.TarInfo):
    """A header, of which those that go before a file's own, and are read at once, are no longer than any name needs."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        member = super().frombuf(buf, encoding, errors)
        if member.type in BEFORE_OTHERS and member.size > CHUNK:
            raise tarfile.ReadError("a header that would fill the memory")
        return member


BEFORE_OTHERS = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip


def _plain_members(
    tar: tarfile.TarFile, archive: Path, show: Callable[[], Any]
) -> tuple[set[PurePosixPath], dict[PurePosixPath, tarfile.TarInfo]]:
    """The folders, and the files by name, of an archive that is read to its end."""
    folders, members = {PurePosixPath()}, {}
    for member in tar:
        path = PurePosixPath(member.name)
        plain = member.isdir() or (member.isreg() and not member.issparse() and member.size >= 0)
        below = not path.is_absolute() and ".." not in path.parts and path.parts[:1] != (f".unpacking-{archive.name}",)
        if not plain or not below or "\0" in member.name:
            raise UserError(f"{archive}: {member.name!r} is no plain file or folder below its top; do not trust it")
        folders.update(path.parents, [path] if member.isdir() else [])
        if not member.isdir():
            members[path] = member
        show()
    if both := folders & members.keys():
        raise UserError(f"{archive}: {str(min(both))!r} is both a file and a folder; do not trust it")
    # A damaged header ends the loop as the archive's end does (python/cpython#120740), which is a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end")
    while tar.fileobj.read(CHUNK):  # to where gzip keeps its checksum
        pass
    return folders, members


def _move(source: Path, target: Path) -> None:
    """Rename, or, where both are folders, move what is in one into the other.

    What is not there yet comes last, and whole folders in one step: as long as one is missing, not all is done.
    """
    if source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir(), key=lambda entry: not (target / entry.name).exists()):
            _move(entry, target / entry.name)
    else:
        source.replace(target)


class Ledger:
    """Hashes of what lies below a folder, noted in its hashes.json, so that what has not changed is not read again."""

    def __init__(self, folder: Path):
        self.folder, self.file = folder, folder / "hashes.json"

    def check(self, path: Path, *, md5: str | None = None, sha256: str | None = None) -> str:
        """SHA-256 of a file, or of a folder's sorted names and SHA-256s; read only if a size or time is not as noted.

        md5, sha256: as published, of a file; without any, the content that was seen first is the right one.
        Raises UserError when the content is not the right one, cannot be read, or hashes.json is damaged, and
        ValueError when `path` is not below the folder.
        """
        name = Path(os.path.abspath(path)).relative_to(os.path.abspath(self.folder)).as_posix()
        noted = self._read().get(name, {})
        try:
            state = _state(path)
            entry = noted if state.items() <= noted.items() else _hashes(path) | state
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        for kind, published in (("md5", md5), ("sha256", sha256)):
            if published not in (None, entry[kind]):
                differs = f"has another content than was published ({kind} {entry[kind]} instead of {published})"
                raise UserError(f"{path}: {differs}; put a right copy in its place, or remove it")
        if md5 is None and sha256 is None and noted and entry["sha256"] != noted["sha256"]:
            differs = f"has changed since it was first used (SHA-256 {entry['sha256']} instead of {noted['sha256']})"
            raise UserError(f"{path}: {differs}\nput the first back, or delete its entry in {self.file}")
        if entry is not noted:
            self._note(name, entry)
        return entry["sha256"]

    def _read(self) -> dict[str, Any]:
        try:
            entries = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            entries = None
        noted = entries.values() if isinstance(entries, dict) else [None]
        if not all(isinstance(entry, dict) and {"sha256", "md5"} <= entry.keys() for entry in noted):
            raise UserError(f"{self.file}: is damaged or unreadable; delete it, and what is there now is noted anew")
        return entries

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        text = json.dumps(self._read() | {name: entry}, indent=1, sort_keys=True)
        own = self.folder / f"hashes-{os.getpid()}"  # another process may be writing too
        try:
            write_atomically(own, lambda new: new.write_text(text, encoding="utf-8"), name=lambda _: self.file)
        except UserError:
            _warn_unwritable(self.file)


@functools.cache
def _warn_unwritable(file: Path) -> None:
    warn(f"{file}: cannot be written, so that the data are read through at every start")


def _hashes(path: Path) -> dict[str, str | None]:
    """SHA-256 and md5 of a file, read once; a folder has no md5."""
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    if path.is_dir():
        for name, _, _ in _files(path):
            sha256.update(os.fsencode(f"{name}\0{_hashes(path / name)['sha256']}\n"))
        return {"sha256": sha256.hexdigest(), "md5": None}
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            md5.update(chunk)
    return {"sha256": sha256.hexdigest(), "md5": md5.hexdigest()}


def _state(path: Path) -> dict[str, Any]:
    """What tells without reading that a file, or any in a folder, has changed."""
    if not path.is_dir():
        status = path.stat()
        return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    return {"listing": hashlib.sha256(repr(_files(path)).encode()).hexdigest()}


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """(name below `folder`, size, modification time in ns) of every file there, sorted; without a ledger's own."""
    found, ahead = [], [""]
    while ahead:
        below = ahead.pop()
        with os.scandir(folder / below) as entries:
            for entry in entries:
                if entry.is_dir():
                    ahead.append(f"{below}{entry.name}/")
                elif entry.name != "hashes.json":
                    found.append((below + entry.name, entry.stat().st_size, entry.stat().st_mtime_ns))
    return sorted(found)
