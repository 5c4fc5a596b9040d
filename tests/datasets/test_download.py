"""Downloads from a server that misbehaves, and archives that are damaged or malicious."""

import contextlib
import functools
import hashlib
import http.server
import io
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import _start

import datasets.download as download
from datasets.download import Downloads, Remote, unpack
from training.exit import exit_with_status
from utils import UserError

CONTENT = random.Random(0).randbytes(50_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's content with ranges, or misbehaves as the next entry of its script says."""

    def do_GET(self):
        server, asked, content = self.server, self.headers["Range"], self.server.content
        server.ranges.append(asked)
        how = server.script.pop(0) if server.script else "well"
        ranges = asked and how != "without ranges"
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if ranges else 0
        body = content[start:]
        if isinstance(how, int):
            self.send_error(how)
        elif start >= len(content):
            self.send_error(416)
        else:
            body = {"wrongly": b"x" * len(body), "a page": b"<html>"}.get(how, body)
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            if how != "without length":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if how == "after a sign":
                server.sign.wait(60)
            self.send(body[: len(body) // 2] if how in ("cut", "stalled") else body)
            if how == "stalled":
                server.sign.wait(60)

    def send(self, data):
        self.server.sent += len(data)
        with contextlib.suppress(ConnectionError):
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine. script: its next answers; sign: what an answer "after a sign" waits for."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.script, server.ranges, server.sent = CONTENT, [], [], 0
        server.sign = threading.Event()
        server.remote = Remote(f"http://127.0.0.1:{server.server_port}/there/file.bin?raw=1", len(CONTENT), MD5)
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.sign.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds between retries, in which nothing waits."""
    seconds = []
    monkeypatch.setattr(download.time, "sleep", seconds.append)
    return seconds


def start_forked(function):
    """Run function() in another process."""
    process = multiprocessing.get_context("fork").Process(target=function)
    _start(process)
    return process


def wait_until(true):
    """Wait for another process; without time.sleep, which `pauses` replaces."""
    for _ in range(10_000):
        if true():
            return
        threading.Event().wait(0.01)
    pytest.fail("does not happen")


STEPS = [(tarfile.TarFile, "makefile"), (shutil, "rmtree"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]


def killed_before_step(number, function):
    """Run function() in a process that is killed before that change of the disk -> whether there were so many."""

    def counted(change):
        def step(*arguments, **options):
            if next(steps) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*arguments, **options)

        return step

    def run():
        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        function()

    steps = itertools.count(1)
    process = start_forked(run)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def assert_refused(*words, lines=2):
    @contextlib.contextmanager
    def refused():
        with pytest.raises(UserError) as error:
            yield
        message = str(error.value)
        assert len(message.splitlines()) == lines, message
        assert all(str(word) in message for word in words), message

    return refused()


# Downloads


@pytest.mark.parametrize("how", ["well", "without length"])
def test_a_file_is_downloaded(server, tmp_path, how):
    server.script = [how]
    path = Downloads().fetch(server.remote, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("published", [{}, {"size": len(CONTENT)}, {"md5": MD5}])
def test_size_and_md5_need_not_be_published(server, tmp_path, published):
    server.script = ["cut"]
    assert Downloads().fetch(Remote(server.remote.url, **published), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("how", "left", "sent"), [("well", 40_000, 10_000), ("well", 50_000, 0), ("without ranges", 1000, 50_000)]
)
def test_an_earlier_download_is_resumed(server, tmp_path, how, left, sent):
    server.script = [how]
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:left])
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [f"bytes={left}-"]
    assert server.sent == sent
    assert names(tmp_path) == ["file.bin"]


def test_temporary_errors_are_tried_again_three_times(server, tmp_path, pauses, capsys):
    server.script = ["cut", 429, 503]
    assert Downloads().fetch(server.remote, tmp_path / "well").read_bytes() == CONTENT
    assert server.ranges == [None, *[f"bytes={HALF}-"] * 3]
    assert server.sent == len(CONTENT)
    assert pauses == [1, 4, 16]
    expected = f"the connection was closed after {HALF} of {len(CONTENT)} bytes; trying again in 1 s"
    assert expected in capsys.readouterr().err
    server.script = ["cut", 500, 500, 500]
    with assert_refused("Error 500: Internal Server Error"):
        Downloads().fetch(server.remote, tmp_path)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:HALF]


def test_a_stalled_connection_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.script = ["stalled"]
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges[:2] == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(
    ("left", "how", "fault"),
    [(b"", "a page", "6 bytes instead of 50000"), *((b"x" * n, "wrongly", MD5) for n in (0, 1000, len(CONTENT)))],
)
def test_wrong_content_is_removed(server, tmp_path, left, how, fault):
    server.script = [how]
    (tmp_path / "file.bin.part").write_bytes(left)
    with assert_refused(f"{server.remote.url}: the downloaded file has ", fault, "was removed; try again\ndownload "):
        Downloads().fetch(server.remote, tmp_path)
    assert names(tmp_path) == []
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT


def test_a_refusal_is_not_tried_again(server, tmp_path, pauses):
    server.script = [404]
    with assert_refused("Error 404: ", f"download {server.remote.url} by hand into {tmp_path}, or name a mirror"):
        Downloads().fetch(server.remote, tmp_path)
    assert len(server.ranges) == 1
    assert pauses == []


def unknown_host(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_servers_that_cannot_be_reached_are_given_up(tmp_path, monkeypatch, pauses):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/file.bin"
    monkeypatch.setenv("no_proxy", "*")
    with assert_refused("Connection refused"):
        Downloads().fetch(Remote(url), tmp_path)
    assert pauses == [1, 4, 16]
    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    with assert_refused("Name or service not known", f"download {url} by hand"):
        Downloads().fetch(Remote(url), tmp_path)
    assert len(pauses) == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_download_whose_process_ends_is_kept(server, tmp_path, number):
    server.script = ["stalled"]
    process = start_forked(lambda: exit_with_status(lambda: Downloads().fetch(server.remote, tmp_path)))
    part = tmp_path / "file.bin.part"
    wait_until(lambda: part.exists() and part.stat().st_size == HALF)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert names(tmp_path) == ["file.bin.part"]
    server.sign.set()
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]


@pytest.mark.parametrize(("there", "fault"), [(b"short", "5 bytes instead of 50000"), (b"x" * 50_000, "md5")])
def test_an_existing_file_is_only_checked(server, tmp_path, there, fault):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert Downloads(allowed=False).fetch(server.remote, tmp_path) == tmp_path / "file.bin"
    (tmp_path / "file.bin").write_bytes(there)
    with assert_refused(tmp_path / "file.bin", fault, "rename it", lines=1):
        Downloads().fetch(server.remote, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == there
    assert server.ranges == []


def test_nothing_is_downloaded_where_that_is_not_allowed(server, tmp_path):
    with assert_refused(f"{tmp_path / 'file.bin'}: is missing\ndownload {server.remote.url}", "without --no-download"):
        Downloads(allowed=False).fetch(server.remote, tmp_path)
    with assert_refused(f"{tmp_path}: lacks file.bin; nothing is downloaded there because only the", "--dataroot DIR"):
        Downloads(only_checkpoint=True).fetch(server.remote, tmp_path)
    assert server.ranges == []
    assert names(tmp_path) == []


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_mirror_on_a_disk(tmp_path, ending, pauses):
    mirror = tmp_path / "mirror of files"
    mirror.mkdir()
    (mirror / "file.bin").write_bytes(CONTENT)
    (tmp_path / "file.bin.part").write_bytes(b"left over")
    downloads = Downloads(mirror=f"file://{mirror}{ending}")
    assert downloads.fetch(Remote("https://example.org/file.bin", md5=MD5), tmp_path).read_bytes() == CONTENT
    with assert_refused("No such file", "download https://example.org/other by hand"):
        downloads.fetch(Remote("https://example.org/other"), tmp_path)
    assert pauses == []


@pytest.mark.parametrize("mirror", ["ftp://example.org/", "/data/mirror", "", "file:mirror"])
def test_other_addresses_of_mirrors_are_refused(mirror):
    with assert_refused(f"--data-url {mirror}: is not the address", "http://", "file://", lines=1):
        Downloads(mirror=mirror)


def test_two_processes_do_not_download_the_same_file(server, tmp_path, monkeypatch):
    warnings = []

    def warn(message):
        warnings.append(message)
        server.sign.set()

    monkeypatch.setattr(download, "warn", warn)
    server.script = ["after a sign"]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: Downloads().fetch(server.remote, tmp_path), range(2)))
    assert [path.read_bytes() for path in paths] == [CONTENT] * 2
    assert server.ranges == [None]
    assert warnings == [f"{tmp_path}: waiting for another process that is downloading or unpacking there"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_on_a_terminal_only(server, tmp_path, monkeypatch, quiet):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    pack(tmp_path / "a.tar", ("a", b"a"))
    Downloads(quiet=quiet).fetch(server.remote, tmp_path)
    unpack(tmp_path / "a.tar", tmp_path, quiet)
    assert all((word in terminal.getvalue()) != quiet for word in ("file.bin", "unpacking a.tar"))
    monkeypatch.setattr(sys, "stderr", no_terminal := io.StringIO())
    Downloads().fetch(server.remote, tmp_path / "again")
    assert no_terminal.getvalue() == ""


# Unpacking


def pack(archive, *members):
    """Write an archive of (name, content), (name, None) for a folder, or (name, type, target of a link)."""
    with tarfile.open(archive, "w:gz" if archive.suffix in (".gz", ".tgz") else "w") as tar:
        for name, content, *link in members:
            member = tarfile.TarInfo(name)
            member.mode = 0o6777
            if link:
                member.type, member.linkname, content = content, link[0], b""
            elif content is None:
                member.type, content = tarfile.DIRTYPE, b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_an_archive_is_unpacked(tmp_path, name):
    folder = tmp_path / "data"
    archive = pack(tmp_path / name, ("./", None), ("./a/", None), ("./a/x", b"1"), ("a/b/y", CONTENT), ("z", b""))
    (folder / f".unpacking-{name}" / "a").mkdir(parents=True)  # left by a process that was killed
    (folder / f".unpacking-{name}" / "a" / "old").touch()
    unpack(archive, folder)
    assert names(folder) == ["a", "a/b", "a/b/y", "a/x", "z"]
    assert (folder / "a" / "b" / "y").read_bytes() == CONTENT
    assert (folder / "a" / "x").stat().st_mode & 0o7022 == 0, "no setuid bits, and others may not write"


def test_what_exists_is_kept(tmp_path):
    archive = pack(tmp_path / "a.tar", ("a/x", b"new"), ("z", b"new"), ("b/y", b"new"))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").touch()
    (tmp_path / "z").write_bytes(b"old")
    unpack(archive, tmp_path)
    assert names(tmp_path) == ["a", "a.tar", "a/mine", "b", "b/y", "z"]
    assert (tmp_path / "z").read_bytes() == b"old"


MALICIOUS = {
    "absolute name here": [("{root}/outside", b"x")],
    "name that goes through above": [("a/../../outside", b"x")],
    "folder above": [("../outside", None)],
    "file through a link": [("a", tarfile.SYMTYPE, ".."), ("a/outside", b"x")],
    "pipe": [("a", tarfile.FIFOTYPE, "")],
    "sparse file": [("a", tarfile.GNUTYPE_SPARSE, "")],
    "too deep": [("a/" * 3000 + "x", b"x")],
    "NUL": [("é\0a", b"x")],
    "file that is a folder": [("a", b"x"), ("a/b", b"x")],
    "file in the place of the top": [("./", tarfile.REGTYPE, "")],
}


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_malicious_archive_leaves_no_trace(tmp_path, kind):
    members = [(name.format(root=tmp_path), *what) for name, *what in MALICIOUS[kind]]
    archive = pack(tmp_path / "bad.tar", ("fine", b"x"), *members)
    with assert_refused(archive, "cannot be unpacked"):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == ["bad.tar", "data"]


DAMAGE = {
    "a.tar": {
        "cut in a file": lambda whole: whole[:1000],
        "empty": lambda whole: b"",
        "no archive": lambda whole: CONTENT,
    },
    "a.tar.gz": {
        "cut": lambda whole: whole[: len(whole) // 2],
        "cut at the end": lambda whole: whole[:-4],
        "wrong checksum": lambda whole: whole[:-8] + bytes(4) + whole[-4:],
        "flipped bytes": lambda whole: whole[:20_000] + b"flip" + whole[20_004:],
    },
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGE for damage in DAMAGE[name]])
def test_a_damaged_archive_leaves_no_trace(tmp_path, name, damage):
    archive = pack(tmp_path / name, ("first", CONTENT), ("second", CONTENT[::-1]))
    archive.write_bytes(DAMAGE[name][damage](archive.read_bytes()))
    with assert_refused(f"{archive}: cannot be unpacked into", "replace the archive if it is damaged"):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == [name, "data"]


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.tgz", ("a", bytes(60_000)), ("b", bytes(60_000)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(200_000, 80_001, 119_999))
    with assert_refused("it needs 120000 bytes, 119999 are free", "free some space"):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == ["a.tgz", "data"]


def archive_of(tmp_path, *folders):
    """A mirror with an archive of a file in each of these folders, and its published size and md5."""
    (tmp_path / "public").mkdir()
    archive = pack(tmp_path / "public" / "set.tar", *((f"{name}/file", CONTENT) for name in folders))
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    return Downloads(archive.parent.as_uri()), Remote("http://nowhere.invalid/set.tar", archive.stat().st_size, md5)


def test_an_archive_is_downloaded_once_and_not_kept(tmp_path):
    downloads, remote = archive_of(tmp_path, "a", "b")
    data, other = tmp_path / "data", tmp_path / "other"
    for _ in range(2):
        assert downloads.fetch_unpacked(remote, data, ("a", "b")) == [data / "a", data / "b"]
        assert names(data) == ["a", "a/file", "b", "b/file"]
        (tmp_path / "public" / "set.tar").unlink(missing_ok=True)
    with assert_refused("set.tar: is missing", "by hand"):
        Downloads(allowed=False).fetch_unpacked(remote, other, ("a",))
    with assert_refused(f"{other}: lacks a of set.tar; nothing is downloaded there"):
        Downloads(only_checkpoint=True).fetch_unpacked(remote, other, ("a",))
    assert not other.exists()


def test_an_archive_that_was_there_is_kept(tmp_path):
    _, remote = archive_of(tmp_path, "a")
    public = tmp_path / "public"
    with assert_refused(f"{public}: lacks a of set.tar"):
        Downloads(only_checkpoint=True).fetch_unpacked(remote, public, ("a",))
    assert names(public) == ["set.tar"]
    Downloads(allowed=False).fetch_unpacked(remote, public, ("a",))
    assert names(public) == ["a", "a/file", "set.tar"]
    assert Downloads(only_checkpoint=True).fetch_unpacked(remote, public, ("a",)) == [public / "a"]
    with assert_refused("set.tar: does not hold c", lines=1):
        Downloads(allowed=False).fetch_unpacked(remote, public, ("a", "c"))


@pytest.mark.parametrize("kept", [False, True])
def test_folders_are_complete_or_missing_after_a_kill_at_any_step(tmp_path, kept):
    """kept: the archive is the user's."""
    downloads, remote = archive_of(tmp_path, "a", "b")
    data = tmp_path / "data"
    for number in itertools.count(1):
        data.mkdir()
        if kept:
            shutil.copy(tmp_path / "public" / "set.tar", data)
        killed = killed_before_step(number, lambda: downloads.fetch_unpacked(remote, data, ("a", "b")))
        for folder in (data / "a", data / "b"):
            assert not folder.exists() or (folder / "file").read_bytes() == CONTENT, f"step {number}"
        downloads.fetch_unpacked(remote, data, ("a", "b"))
        assert [(data / name / "file").read_bytes() for name in ("a", "b")] == [CONTENT] * 2
        if not killed:
            break
        shutil.rmtree(data)
    assert number > 4
    assert names(data) == ["a", "a/file", "b", "b/file", *(["set.tar"] if kept else [])]


def test_several_processes_unpack_an_archive_once(tmp_path):
    downloads, remote = archive_of(tmp_path, "a", "b")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: downloads.fetch_unpacked(remote, tmp_path / "data", ("a", "b")), range(6)))
    assert found == [[tmp_path / "data" / "a", tmp_path / "data" / "b"]] * 6
    assert names(tmp_path / "data") == ["a", "a/file", "b", "b/file"]
