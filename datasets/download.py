"""Download files from public addresses or a mirror, check them, and unpack archives."""

import contextlib
import hashlib
import os
import shutil
import ssl
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from utils import UserError, first_line, warn

TIMEOUT = 60.0  # seconds without a byte after which a connection is closed
PAUSES = (1.0, 4.0, 16.0)  # seconds before each retry
CHUNK = 1 << 20  # bytes
# All other OSErrors are errors of the disk. ValueError: a malformed address.
TEMPORARY_ERRORS = (HTTPException, ConnectionError, TimeoutError)
NETWORK_ERRORS = (URLError, ssl.SSLError, ValueError, *TEMPORARY_ERRORS)


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

    def mismatch(self, path: Path) -> str | None:
        """How a file differs from the published one; None if it does not."""
        if self.size is not None and (size := path.stat().st_size) != self.size:
            return f"has {size} bytes instead of {self.size}"
        if self.md5 is not None:
            with path.open("rb") as file:
                md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
            if md5 != self.md5:
                return f"has md5 {md5} instead of {self.md5}"
        return None


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
        if self.mirror is not None and not self.mirror.startswith(("http://", "https://", "file://")):
            raise UserError(
                f"--data-url {self.mirror}: is not the address of a folder (http://..., https://... or file:///...)"
            )

    def fetch(self, remote: Remote, folder: Path) -> Path:
        """folder / remote.name, complete and with the published size and md5; a file that exists is only checked.

        A download that fails or is interrupted leaves <name>.part, and the next call resumes it. Raises Missing when
        the file is missing and may not or cannot be downloaded, and UserError when the existing file is wrong.
        """
        if (folder / remote.name).exists():
            return self._fetch(remote, folder)
        with self._writing(remote, folder, remote.name):
            return self._fetch(remote, folder)

    def fetch_unpacked(self, archive: Remote, folder: Path, holds: Sequence[str]) -> list[Path]:
        """The sub-folders `holds` of `folder`, downloaded as `archive` and unpacked where one is missing.

        An archive that was downloaded for this is removed; one that was there is kept. Raises what `fetch` and
        `unpack` raise, and UserError when the archive does not hold them.
        """
        path = folder / archive.name
        if missing := _missing(folder, holds):
            with self._writing(archive, folder, f"{missing[0]} of {archive.name}"):
                # Another process may have unpacked and removed the archive while this one waited.
                if _missing(folder, holds):
                    was_there = path.exists()
                    unpack(self._fetch(archive, folder), folder, self.quiet)
                    if not was_there:
                        path.unlink()
        if missing := _missing(folder, holds):
            raise UserError(f"{path}: does not hold {missing[0]}")
        return [folder / name for name in holds]

    @contextlib.contextmanager
    def _writing(self, remote: Remote, folder: Path, what: str) -> Iterator[None]:
        """Lock `folder`. Raises Missing where `what` may not or cannot be put there."""
        path = folder / remote.name
        if self.only_checkpoint:
            raise Missing(
                f"{folder}: lacks {what}; nothing is downloaded there because only the checkpoint names it\n"
                "say where the data are, or may be downloaded to, with --dataroot DIR"
            )
        if not self.allowed and not path.exists():
            by_hand = f"download {remote.url} by hand into {folder}"
            raise Missing(f"{path}: is missing\n{by_hand}, or run without --no-download")
        try:
            with _lock(folder):
                yield
        except OSError as error:
            remedy = "free some space, fix its permissions or use another folder"
            raise Missing(f"{folder}: cannot be read or written ({error}); {remedy}") from None

    def _fetch(self, remote: Remote, folder: Path) -> Path:
        path = folder / remote.name
        if not path.exists():
            return self._download(remote, path)
        if fault := remote.mismatch(path):
            raise UserError(f"{path}: {fault}; replace it with a correct copy, or rename it to download another")
        return path

    def _download(self, remote: Remote, path: Path) -> Path:
        url = remote.url
        if self.mirror is not None:
            url = f"{quote(self.mirror.rstrip('/'), safe='/:@[]%')}/{quote(remote.name)}"
        part = path.with_name(f"{path.name}.part")
        by_hand = f"download {remote.url} by hand into {path.parent}, or name a mirror with --data-url"
        for pause in (*PAUSES, None):
            try:
                _receive(url, part, remote, self.quiet)
                break
            except NETWORK_ERRORS as error:
                status, cause = getattr(error, "code", 0), getattr(error, "reason", error)  # what URLError wraps
                temporary = status >= 500 or status in (408, 429) or isinstance(cause, TEMPORARY_ERRORS)
                if pause is None or not temporary:
                    raise Missing(f"{url}: {first_line(error)}\n{by_hand}") from None
                if not self.quiet:
                    warn(f"{url}: {first_line(error)}; trying again in {pause:g} s")
                time.sleep(pause)
        if fault := remote.mismatch(part):
            part.unlink()  # it may have begun as a part of another version, so that another try may succeed
            raise Missing(f"{url}: the downloaded file {fault} and was removed; try again\n{by_hand}")
        return part.replace(path)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warn(f"{folder}: waiting for another process that is downloading or unpacking there")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _missing(folder: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if not (folder / name).is_dir()]


def _receive(url: str, part: Path, remote: Remote, quiet: bool) -> None:
    """Append to `part` what is missing, or download from the start where the server does not resume."""
    with part.open("ab") as file:
        size = file.tell()
        headers = {"User-Agent": "adversarial-autoaugment"} | ({"Range": f"bytes={size}-"} if size else {})
        try:
            response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
        except HTTPError as error:
            if error.code == 416 and size:  # nothing follows: `part` is complete, or the part of another file
                return
            raise
        with response:
            if response.status != 206:
                size = 0
                file.truncate(0)
            length = response.headers.get("Content-Length")
            total = remote.size if length is None else size + int(length)
            shown = {"unit": "B", "unit_scale": True, "disable": quiet or None}  # None: hidden except on a terminal
            with tqdm(desc=remote.name, total=total, initial=size, leave=False, **shown) as bar:
                while chunk := response.read1(CHUNK):
                    file.write(chunk)
                    size += len(chunk)
                    bar.update(len(chunk))
    if total is not None and size < total:
        raise ConnectionError(f"the connection was closed after {size} of {total} bytes")


def unpack(archive: Path, folder: Path, quiet: bool = False) -> None:
    """Unpack a tar archive, compressed or not, into `folder`: all of it, or nothing where it is bad.

    What exists already is kept. Raises UserError for an archive that is damaged, holds anything but regular files and
    folders below its top, or needs more space than is free; and for a folder that cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".unpacking-{archive.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a kill
    try:
        with tarfile.open(archive) as tar:
            members = []
            for member in tar:
                if member.size < 0:  # an earlier header would follow, again and again
                    raise tarfile.ReadError("a negative size")
                members.append(member)
            while tar.fileobj.read(CHUNK):  # to the checksum of gzip
                pass
            needed, free = sum(member.size for member in members), shutil.disk_usage(folder).free
            if needed > free:
                raise OSError(f"it needs {needed} bytes, {free} are free")
            bar = tqdm(members, f"unpacking {archive.name}", unit="file", disable=quiet or None, leave=False)
            temporary.mkdir()
            tar.extractall(temporary, bar, filter=_files_and_folders)
        for entry in temporary.iterdir():
            if not (folder / entry.name).exists():
                entry.replace(folder / entry.name)
    except Exception as error:  # damage raises many types: TarError, EOFError, zlib.error, OSError, ValueError, ...
        raise UserError(
            f"{archive}: cannot be unpacked into {folder} ({first_line(error)})\n"
            "free some space, or replace the archive if it is damaged"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files_and_folders(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's "data" filter, which also refuses links, sparse files and absolute names."""
    filtered = tarfile.data_filter(member, folder)
    if filtered.name != member.name or member.issparse() or not (member.isreg() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return filtered
