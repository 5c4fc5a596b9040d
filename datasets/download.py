"""Download files from public addresses or a mirror, check them, and unpack archives."""

import contextlib
import hashlib
import http.client
import os
import re
import shutil
import socket
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils import UserError, warn

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

STALL = 60.0  # seconds without a byte after which a connection is closed
PAUSES = (1.0, 4.0, 16.0)  # seconds before each retry; bytes gained start the count again
CHUNK = 1 << 20  # bytes
# In a folder that was empty: a name of the archive is both a file and a folder.
NAME_CLASHES = (FileExistsError, IsADirectoryError, NotADirectoryError)
ADDRESS = re.compile(r"https?://[\w.-]+(:\d+)?(/.*)?|file://(localhost)?/.*")


class Missing(UserError):
    """A file or folder is missing, and may not or cannot be downloaded."""


@dataclass(frozen=True)
class Remote:
    """A file with a public address. size in bytes, md5 in hex: None where none is published."""

    url: str
    size: int | None = None
    md5: str | None = None

    @property
    def name(self) -> str:
        return PurePosixPath(unquote(urlsplit(self.url).path)).name


@dataclass(frozen=True)
class Downloads:
    """Where missing files come from, and whether they may be downloaded at all.

    Raises UserError for a mirror whose address does not begin with http://, https:// or file://.
    """

    mirror: str | None = None  # --data-url: the address of a folder that replaces the public ones
    allowed: bool = True  # False: --no-download
    quiet: bool = False  # without progress bars and warnings
    only_checkpoint: bool = False  # only a checkpoint names the folder: nothing is downloaded or unpacked there

    def __post_init__(self):
        if self.mirror is not None and not ADDRESS.fullmatch(self.mirror):
            raise UserError(
                f"--data-url {self.mirror}: is not the address of a folder (http://..., https://... or file:///...)"
            )

    def fetch(self, remote: Remote, folder: Path) -> Path:
        """folder / remote.name, complete and with the published size and md5; a file that exists is only checked.

        A download that fails or is interrupted leaves <name>.part, and the next call resumes it. Raises Missing when
        the file is missing and may not or cannot be downloaded, and UserError when the existing file is wrong.
        """
        with _disk_errors(folder):
            if (folder / remote.name).exists():
                return self._fetch(remote, folder)
            self._require_allowed(remote, folder, remote.name)
            with _lock(folder):
                return self._fetch(remote, folder)

    def fetch_unpacked(self, archive: Remote, folder: Path, holds: Sequence[str]) -> list[Path]:
        """The sub-folders `holds` of `folder`, downloaded as `archive` and unpacked where one is missing.

        An archive that was downloaded for this is removed again, also after a kill; one that was there is kept.
        Raises what `fetch` and `unpack` raise, and UserError when the archive does not hold them.
        """
        folders, path = [folder / name for name in holds], folder / archive.name
        downloaded = folder / f".fetched-{archive.name}"  # exists while there is an archive to remove
        with _disk_errors(folder):
            missing = [path.name for path in folders if not path.is_dir()]
            if missing:
                self._require_allowed(archive, folder, f"{missing[0]} of {archive.name}")
            if missing or (downloaded.exists() and not self.only_checkpoint):
                with _lock(folder):
                    # Another process may have unpacked and removed the archive while this one waited.
                    if not all(path.is_dir() for path in folders):
                        was_there = path.exists()
                        self._fetch(archive, folder)
                        if not was_there:
                            downloaded.touch()
                        unpack(path, folder, self.quiet)
                    with contextlib.suppress(OSError):
                        downloaded.unlink()
                        path.unlink()
        for path in folders:
            if not path.is_dir():
                raise UserError(f"{folder / archive.name}: does not hold {path.name}")
        return folders

    def fetch_and_unpack(self, archive: Remote, folder: Path) -> None:
        """Unpack an archive over what `folder` holds, and keep it. Raises what `fetch` and `unpack` raise."""
        with _disk_errors(folder):
            self._require_allowed(archive, folder, f"the content of {archive.name}")
            with _lock(folder):
                unpack(self._fetch(archive, folder), folder, self.quiet)

    def _require_allowed(self, remote: Remote, folder: Path, what: str) -> None:
        """Raises Missing where `what`, from an existing archive or a missing file, may not be put into `folder`."""
        if self.only_checkpoint:
            raise Missing(
                f"{folder}: lacks {what}; nothing is downloaded there because only the checkpoint names it\n"
                "say where the data are, or may be downloaded to, with --dataroot DIR"
            )
        path = folder / remote.name
        if not self.allowed and not path.exists():
            raise Missing(f"{path}: is missing\n{_by_hand(remote, folder)} run without --no-download")

    def _fetch(self, remote: Remote, folder: Path) -> Path:
        path = folder / remote.name
        if not path.exists():
            return self._download(remote, path)
        if fault := _fault(path, remote):
            raise UserError(f"{path}: {fault}; remove it to download it again, or replace it with a correct copy")
        return path

    def _download(self, remote: Remote, path: Path) -> Path:
        url, part = self._address(remote), path.with_name(f"{path.name}.part")
        remedy = f"{_by_hand(remote, path.parent)} name a mirror with --data-url"
        part.touch()
        resumed = largest = part.stat().st_size
        retries = 0
        while True:
            try:
                _receive(url, part, remote, self.quiet)
                break
            except KeyboardInterrupt as stop:
                kept = f"the downloaded part of {remote.name} is kept; the same command resumes the download"
                raise type(stop)(kept) from None
            except _DownloadError as error:
                size = part.stat().st_size
                largest, retries = max(size, largest), 0 if size > largest else retries
                if not error.temporary or retries == len(PAUSES):
                    if size == 0:
                        part.unlink()
                    raise Missing(f"{url}: {error}\n{remedy}") from None
                if not self.quiet:
                    warn(f"{url}: {error}; trying again in {PAUSES[retries]:g} s")
                time.sleep(PAUSES[retries])
                retries += 1
        if fault := _fault(part, remote):
            part.unlink()
            if resumed:  # the part may be of another version, or from another mirror
                if not self.quiet:
                    warn(f"{part}: was not the beginning of {url}; downloading it from the start")
                return self._download(remote, path)
            raise Missing(f"{url}: the downloaded file {fault}\n{remedy}")
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
    return f"download {remote.url} by hand into {folder}, or"


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Raises Missing where `folder` cannot be read or written, as on a full disk."""
    try:
        yield
    except OSError as error:
        remedy = "free some space, fix its permissions or use another folder"
        raise Missing(f"{folder}: cannot be read or written ({error}); {remedy}") from None


class _DownloadError(Exception):
    """Why a server did not deliver. temporary: another try may succeed."""

    def __init__(self, reason: str, *, temporary: bool, status: int | None = None):
        super().__init__(reason)
        self.temporary, self.status = temporary, status


@contextlib.contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Raises _DownloadError for errors of the connection: an OSError outside is one of the local disk."""
    try:
        yield
    except HTTPError as error:
        error.close()
        temporary = error.code >= 500 or error.code in (408, 429)
        raise _DownloadError(f"{error.code} {error.reason}", temporary=temporary, status=error.code) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = getattr(error, "reason", error)  # what URLError wraps
        reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
        # gaierror: a host name that is unknown, or no network. ValueError: a malformed address, or a bad certificate.
        temporary = not url.startswith("file:") and not isinstance(cause, ValueError | socket.gaierror)
        raise _DownloadError(reason, temporary=temporary) from None


def _receive(url: str, part: Path, remote: Remote, quiet: bool) -> None:
    """Append to `part` what is missing; from the start where the server does not resume. Raises _DownloadError."""
    with part.open("ab") as file:
        size = file.tell()
        headers = {"User-Agent": "adversarial-autoaugment"} | ({"Range": f"bytes={size}-"} if size else {})
        try:
            with _network_errors(url):
                response = urlopen(Request(url, headers=headers), timeout=STALL)
        except _DownloadError as error:
            if error.status == 416 and size:  # nothing follows: `part` is complete, or the part of another file
                return
            raise
        with response:
            if response.status != 206:
                size = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
                file.truncate(0)
                raise _DownloadError("sent another range than requested", temporary=True)
            length = response.headers.get("Content-Length", "")
            total = size + int(length) if length.isdecimal() else None
            if None not in (total, remote.size) and total != remote.size:
                raise _DownloadError(f"would send {total} bytes instead of {remote.size}", temporary=False)
            file.truncate(size)
            with _bar(remote.name, total or remote.size, quiet, size) as bar:
                while total is None or size < total:
                    with _network_errors(url):
                        chunk = response.read1(CHUNK if total is None else min(CHUNK, total - size))
                    if not chunk:
                        break
                    file.write(chunk)
                    size += len(chunk)
                    bar.update(len(chunk))
    if size < (expected := total or remote.size or 0):
        raise _DownloadError(f"the connection was closed after {size} of {expected} bytes", temporary=True)


def _fault(path: Path, remote: Remote) -> str:
    """How a file differs from the published one; empty where it does not."""
    if remote.size is not None and (size := path.stat().st_size) != remote.size:
        return f"has {size} bytes instead of {remote.size}"
    if remote.md5 is not None:
        with path.open("rb") as file:
            md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != remote.md5:
            return f"has md5 {md5} instead of {remote.md5}"
    return ""


def _bar(title: str, total: int | None, quiet: bool, done: int = 0) -> tqdm:
    hidden = True if quiet else None  # None: hidden unless stderr is a terminal
    return tqdm(desc=title, total=total, initial=done, unit="B", unit_scale=True, disable=hidden, leave=False)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make `folder`; other processes that download into it wait, where its file system supports locks."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warn(f"{folder}: waiting for another process that is downloading or unpacking there")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def unpack(archive: Path, folder: Path, quiet: bool = False) -> None:
    """Unpack a tar archive, compressed or not, into `folder`: all of it, or nothing where it is bad.

    Existing files are replaced. Raises UserError for an archive that is damaged, holds anything but regular files and
    folders below its top, or needs more space than is free; and for a folder that cannot be written to.
    """
    temporary = folder / f".unpacking-{archive.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if temporary.exists():  # since a kill
            shutil.rmtree(temporary)
        with archive.open("rb") as file:
            _unpack(file, archive, temporary, quiet)
        _move(temporary, folder)
    except OSError as error:
        remedy = "free some space, or remove what is in the way"
        raise UserError(f"{folder}: {archive.name} cannot be unpacked there ({error}); {remedy}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _unpack(file: BinaryIO, archive: Path, folder: Path, quiet: bool) -> None:
    if not hasattr(tarfile, "data_filter"):
        raise UserError(f"{archive}: unpacking it safely needs Python 3.11.4 or later; unpack it by hand: tar -xf")
    try:
        tar = tarfile.open(fileobj=file)  # noqa: SIM115 (closed with `file`)
        members = _members(tar)
    except Exception:  # damage raises many types: TarError, EOFError, zlib.error, OSError, ValueError, ...
        raise UserError(f"{archive}: is incomplete, damaged or no tar archive; remove it and try again") from None
    needed, free = sum(member.size for member in members), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise UserError(f"{folder.parent}: {archive.name} needs {needed} bytes there, {free} are free; free some space")
    folder.mkdir()
    with _bar(f"unpacking {archive.name}", needed, quiet) as bar:
        for member in members:
            try:
                tar.extract(member, folder, filter=_files_and_folders)
            except (tarfile.FilterError, ValueError, RecursionError, *NAME_CLASHES):
                reason = f"{member.name!r} is not a regular file or folder below its top"
                raise UserError(f"{archive}: {reason}; do not trust it") from None
            bar.update(member.size)


def _members(tar: tarfile.TarFile) -> list[tarfile.TarInfo]:
    """All members of an archive, which is read to its end. Raises ReadError and others for damage."""
    members = []
    for member in tar:
        if member.size < 0:  # an earlier header would follow, again and again
            raise tarfile.ReadError("a negative size")
        members.append(member)
    # A damaged header ends the iteration like the end of the archive (python/cpython#120740), a block of zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end")
    while tar.fileobj.read(CHUNK):  # to the checksum of gzip
        pass
    return members


def _files_and_folders(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's "data" filter, which also refuses links, sparse files and absolute names, and keeps no times."""
    filtered = tarfile.data_filter(member, folder)
    if filtered.name != member.name or member.issparse() or not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return filtered.replace(mtime=None, deep=False)


def _move(source: Path, target: Path) -> None:
    """Rename, or, where both are folders, move what is in one into the other.

    What does not exist yet comes last, and whole folders in one step: while one is missing, not all is done.
    """
    if source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir(), key=lambda entry: not (target / entry.name).exists()):
            _move(entry, target / entry.name)
    else:
        source.replace(target)
