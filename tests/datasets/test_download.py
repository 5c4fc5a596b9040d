"""Fetching from a server that misbehaves, unpacking archives that were made to do harm, and remembering hashes."""

import contextlib
import errno
import functools
import gzip
import hashlib
import http.server
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import tempfile
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import _start
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets.download as download
from datasets.download import Downloads, Ledger, Remote, unpack
from training.exit import exit_with_status
from utils import UserError

CONTENT = random.Random(0).randbytes(50_000)
MD5 = hashlib.md5(CONTENT).hexdigest()
HALF = len(CONTENT) // 2


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's content with ranges, or misbehaves as the next word of its script says."""

    def do_GET(self):
        server, asked, content = self.server, self.headers["Range"], self.server.content
        half = len(content) // 2
        server.ranges.append(asked)
        how = server.script.pop(0) if server.script else "well"
        ranges = asked and how not in ("without ranges", "in chunks", "in chunks, cut")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if ranges else 0
        body = content[start:]
        if how == "redirected":
            self.send_response(302)
            self.send_header("Location", "/elsewhere/file.bin")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif isinstance(how, int):
            self.send_error(how)
        elif start >= len(content):
            self.send_error(416)
        elif how in ("in chunks", "in chunks, cut"):
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.send(f"{len(body):x}\r\n".encode() + (body + b"\r\n0\r\n\r\n" if how == "in chunks" else body[:half]))
            self.close_connection = True
        else:
            body = {"wrongly": b"x" * len(body), "a page": b"<html>"}.get(how, body)
            announced = len(body) + {"too long": 10, "too short": -10}.get(how, 0)
            self.send_response(206 if start else 200)
            if start:
                first = start + 1 if how == "another range" else start
                self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
            if how != "without length":
                self.send_header("Content-Length", str(announced))
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


@contextlib.contextmanager
def serving(content):
    """A server on this machine. script: of its next answers; sign: to go on where it waits for one."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.script, server.ranges, server.sent = content, [], [], 0
        server.sign = threading.Event()
        thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield server
        server.sign.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with serving(CONTENT) as server:
        server.remote = Remote(f"http://127.0.0.1:{server.server_port}/there/file.bin?raw=1", len(CONTENT), MD5)
        yield server


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The seconds that would have been waited between tries."""
    seconds = []
    monkeypatch.setattr(download.time, "sleep", seconds.append)
    return seconds


def start_forked(function):
    """function() in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=function)
    _start(process)
    return process


def wait_until(true):
    """For what another process does; without time.sleep, in whose place the tests here have something else."""
    for _ in range(10_000):
        if true():
            return
        threading.Event().wait(0.01)
    pytest.fail("does not happen")


STEPS = [
    (shutil, "copyfileobj"),
    (shutil, "rmtree"),
    *((Path, name) for name in ("replace", "unlink", "mkdir", "touch")),
]


def killed_before_step(number, function):
    """function() in a process that is killed before its so-many-th change of the disk -> whether it came that far."""

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


# Fetching


@pytest.mark.parametrize("how", ["well", "redirected", "in chunks", "without length"])
def test_a_file_is_fetched_whole(server, tmp_path, how):
    server.script = [how]
    path = Downloads().fetch(server.remote, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "file.bin"
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("published", [{}, {"size": len(CONTENT)}, {"md5": MD5}])
def test_a_file_is_fetched_with_whatever_is_published_of_it(server, tmp_path, published):
    server.script = ["cut"]
    assert Downloads().fetch(Remote(server.remote.url, **published), tmp_path).read_bytes() == CONTENT


def test_what_an_earlier_run_left_is_carried_on_from(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:40_000])
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=40000-"]
    assert server.sent == len(CONTENT) - 40_000
    assert names(tmp_path) == ["file.bin"]


def test_a_connection_that_is_cut_is_taken_up_where_it_was(server, tmp_path, pauses, capsys):
    server.script = ["cut"] * 6  # each brings something, so that they do not add up to a failure
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges[:3] == [None, f"bytes={HALF}-", f"bytes={HALF + HALF // 2}-"]
    assert server.sent == len(CONTENT)
    assert pauses == [1] * 6
    assert (
        f"the connection was cut after {HALF} of {len(CONTENT)} bytes; trying again in 1 s" in capsys.readouterr().err
    )


def test_a_server_without_ranges_that_is_always_cut_is_given_up(server, tmp_path, pauses):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:100])
    server.script = ["in chunks, cut"] * 20
    with assert_refused("IncompleteRead", "or name a mirror with --data-url"):
        Downloads(quiet=True).fetch(server.remote, tmp_path)
    assert len(server.ranges) == 4
    assert pauses == [1, 4, 16]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:HALF]


def test_a_server_that_always_falls_back_is_given_up(server, tmp_path, pauses):
    server.script = ["in chunks, cut", "another range"] * 10
    with assert_refused("sent another range"):
        Downloads(quiet=True).fetch(server.remote, tmp_path)
    assert pauses == [1, 4, 16]


def test_a_server_that_ignores_ranges_starts_over(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"old" * 1000)
    server.script = ["without ranges"]
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=3000-"]


def test_another_range_than_asked_for_is_not_appended(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.script = ["another range"]
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize("published", [{"size": len(CONTENT), "md5": MD5}, {"md5": MD5}])
def test_a_part_of_something_else_is_replaced(server, tmp_path, published, capsys):
    """It is found out at the end only; what comes then is judged by itself."""
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    remote = Remote(server.remote.url, **published)
    assert Downloads().fetch(remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=1000-", None]
    assert capsys.readouterr().err.endswith(f"was not the beginning of {remote.url}; fetching it anew\n")
    (tmp_path / "file.bin").rename(tmp_path / "file.bin.part")
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    server.script = ["well", "wrongly"]
    with assert_refused("what came from there has md5"):
        Downloads(quiet=True).fetch(remote, tmp_path)
    assert server.ranges[2:] == ["bytes=1000-", None]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("left", "ranges"),
    [
        (CONTENT, [f"bytes={len(CONTENT)}-"]),
        (b"x" * len(CONTENT), [f"bytes={len(CONTENT)}-", None]),
        (CONTENT + b"more", [f"bytes={len(CONTENT) + 4}-", None]),
    ],
)
def test_a_part_with_nothing_to_follow_is_the_file_or_is_replaced(server, tmp_path, left, ranges):
    (tmp_path / "file.bin.part").write_bytes(left)
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ranges


def test_a_server_that_never_has_the_range_is_given_up(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    server.script = [416] * 9
    with assert_refused("416"):
        Downloads().fetch(server.remote, tmp_path)
    assert server.ranges == ["bytes=1000-", None]


@pytest.mark.parametrize(("how", "bytes_"), [("too long", 50_010), ("too short", 49_990), ("a page", 6)])
def test_a_file_of_another_length_is_refused_before_it_is_fetched(server, tmp_path, how, bytes_):
    server.script = [how]
    with assert_refused(f"would send {bytes_} bytes instead of 50000\n", server.remote.url):
        Downloads().fetch(server.remote, tmp_path)
    assert names(tmp_path) == []


def test_a_length_too_long_is_found_out_by_the_hash(server, tmp_path):
    server.script = ["too long"]
    assert Downloads().fetch(Remote(server.remote.url, md5=MD5), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["too short", "wrongly"])
def test_wrong_content_is_removed(server, tmp_path, how):
    server.script = [how]
    with assert_refused(f"{server.remote.url}: what came from there has md5 ", f"instead of {MD5}\nfetch "):
        Downloads().fetch(Remote(server.remote.url, md5=MD5), tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("code", [403, 404])
def test_a_refusal_is_not_tried_again(server, tmp_path, code, pauses):
    server.script = [code]
    with assert_refused(
        f": {code} ", f"fetch {server.remote.url} by hand and put it into {tmp_path}, or name a mirror"
    ):
        Downloads().fetch(server.remote, tmp_path)
    assert len(server.ranges) == 1
    assert pauses == []
    assert names(tmp_path) == []


def test_what_may_pass_is_tried_again(server, tmp_path, pauses):
    server.script = [500, 429, 503]
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert pauses == [1, 4, 16]


def test_what_has_come_stays_after_a_failure(server, tmp_path, pauses):
    server.script = ["cut", 500, 500, 500, 500]
    with assert_refused("500 Internal Server Error"):
        Downloads().fetch(server.remote, tmp_path)
    assert pauses == [1, 4, 16]
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:HALF]


def test_a_server_that_is_not_there_is_given_up(tmp_path, server):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/file.bin"
    with assert_refused("Connection refused"):
        Downloads().fetch(Remote(url), tmp_path)


def not_resolved(*_, **__):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_name_that_nobody_knows_is_given_up_soon(tmp_path, server, monkeypatch, pauses):
    """Mistyped, or without a network; unless it has been known before: then that may pass."""
    resolve, asked = socket.getaddrinfo, []

    def sometimes(*arguments, **options):
        asked.append(arguments)
        return (not_resolved if len(asked) in (2, 3) else resolve)(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", not_resolved)
    with assert_refused("Name or service not known", f"fetch {server.remote.url} by hand"):
        Downloads().fetch(server.remote, tmp_path)
    assert pauses == [1]
    assert names(tmp_path) == []
    monkeypatch.setattr(socket, "getaddrinfo", sometimes)
    server.script = ["cut"]
    assert Downloads(quiet=True).fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert pauses[1:] == [1, 4, 16]


@pytest.mark.parametrize("host", ["a..b", "x" * 80])
def test_an_address_that_cannot_be_one_is_not_tried_again(tmp_path, pauses, host):
    with assert_refused(f"http://{host}/file.bin: "):
        Downloads(f"http://{host}").fetch(Remote("https://example.org/file.bin"), tmp_path)
    assert pauses == []


def test_a_stalled_connection_is_taken_up_again(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "STALL", 0.3)
    server.script = ["stalled"]
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges[:2] == [None, f"bytes={HALF}-"]


class Bar:
    """In the place of a progress bar: something happens once bytes have come."""

    def __init__(self, error):
        self.error = error

    def update(self, _):
        raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_what_has_come_stays_after_an_interruption(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "CHUNK", 1000)
    monkeypatch.setattr(download, "_bar", lambda *_: Bar(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt, match=r"what has come of file.bin is kept; the same command carries on"):
        Downloads().fetch(server.remote, tmp_path)
    part = (tmp_path / "file.bin.part").read_bytes()
    assert 0 < len(part) <= 1000
    assert CONTENT.startswith(part)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_has_come_stays_after_the_end_of_the_process(server, tmp_path, number, capfd):
    server.script = ["stalled"]

    def fetch():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background of a shell
        exit_with_status(lambda: Downloads().fetch(server.remote, tmp_path))

    process, part = start_forked(fetch), tmp_path / "file.bin.part"
    wait_until(lambda: part.exists() and part.stat().st_size == HALF)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    if number == signal.SIGTERM:
        said = "terminated; what has come of file.bin is kept; the same command carries on from there\n"
        assert capfd.readouterr().err == said
    assert names(tmp_path) == ["file.bin.part"]
    server.sign.set()
    assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, f"bytes={HALF}-"]


def test_a_full_disk_is_named_with_its_remedy(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_bar", lambda *_: Bar(OSError(errno.ENOSPC, "No space left on device")))
    with assert_refused(f"{tmp_path}: cannot be read or written", "No space left on device", "make room", lines=1):
        Downloads().fetch(server.remote, tmp_path)
    assert len(server.ranges) == 1


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").touch()
    with assert_refused(f"{tmp_path / 'file' / 'data'}: cannot be read or written", lines=1):
        Downloads().fetch(server.remote, tmp_path / "file" / "data")


def test_a_file_that_is_there_is_not_fetched_anew(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert Downloads(allowed=False).fetch(server.remote, tmp_path) == tmp_path / "file.bin"
    assert server.ranges == []


@pytest.mark.parametrize(("there", "fault"), [(b"short", "5 bytes instead of 50000"), (b"x" * 50_000, "md5")])
def test_a_wrong_file_that_is_there_is_refused_and_left(server, tmp_path, there, fault):
    (tmp_path / "file.bin").write_bytes(there)
    with assert_refused(tmp_path / "file.bin", fault, "remove it", lines=1):
        Downloads().fetch(server.remote, tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == there


def test_nothing_is_fetched_where_that_is_not_allowed(server, tmp_path):
    with assert_refused(f"{tmp_path / 'file.bin'}: is not there\nfetch {server.remote.url}", "without --no-download"):
        Downloads(allowed=False).fetch(server.remote, tmp_path)
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
    with assert_refused(f"{(mirror / 'other').as_uri()}: No such file", "fetch https://example.org/other by hand"):
        downloads.fetch(Remote("https://example.org/other"), tmp_path)
    assert pauses == []
    (mirror / "other").write_bytes(b"something else")
    with assert_refused((mirror / "other").as_uri(), f"instead of {MD5}"):
        downloads.fetch(Remote("https://example.org/other", md5=MD5), tmp_path)
    assert names(tmp_path) == ["file.bin", "mirror of files", "mirror of files/file.bin", "mirror of files/other"]


def test_a_mirror_on_a_server(server, tmp_path):
    downloads = Downloads(mirror=f"http://127.0.0.1:{server.server_port}/a/folder?key=1")
    assert downloads.fetch(Remote("https://example.org/file.bin", md5=MD5), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "mirror",
    ["ftp://example.org/", "data:,x", "/data/mirror", "", "https://", "http://[::1/", "file:mirror", "http://a:x"],
)
def test_an_address_of_another_kind_is_refused(mirror):
    with assert_refused(f"--data-url {mirror}: is no address", "http://", "file://", lines=1):
        Downloads(mirror=mirror)


def test_two_processes_do_not_fetch_the_same_file(server, tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
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
    assert warnings == [f"{tmp_path}: waiting for another process that is fetching or unpacking there"]


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
    assert all((word in terminal.getvalue()) != quiet for word in ("file.bin", "unpacking a.tar", "B/s"))
    monkeypatch.setattr(sys, "stderr", no_terminal := io.StringIO())
    Downloads().fetch(server.remote, tmp_path / "again")
    assert no_terminal.getvalue() == ""


# Unpacking


def pack(archive, *members):
    """Write an archive of (name, content), or of (name, None) for a folder, or (name, type, where a link points)."""
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
    (folder / f".unpacking-{name}" / "a").mkdir(parents=True)  # left by a run that was killed
    (folder / f".unpacking-{name}" / "a" / "old").touch()
    unpack(archive, folder)
    assert names(folder) == ["a", "a/b", "a/b/y", "a/x", "z"]
    assert (folder / "a" / "b" / "y").read_bytes() == CONTENT
    (folder / "plain").touch()
    assert (folder / "a" / "x").stat().st_mode == (folder / "plain").stat().st_mode


def test_a_damaged_older_copy_is_replaced_file_by_file(tmp_path):
    archive = pack(tmp_path / "a.tar", ("a/b/x", b"new"), ("a/c/y", b"new"), ("z", b"new"), ("a/b/x", b"newer"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"ol")
    (tmp_path / "a" / "mine").touch()
    (tmp_path / "z").touch()
    unpack(archive, tmp_path)
    assert names(tmp_path) == ["a", "a.tar", "a/b", "a/b/x", "a/c", "a/c/y", "a/mine", "z"]
    assert (tmp_path / "a" / "b" / "x").read_bytes() == b"newer"
    assert (tmp_path / "z").read_bytes() == b"new"


def test_what_stands_in_the_way_is_named(tmp_path):
    archive = pack(tmp_path / "a.tar", ("a/x", b"new"))
    (tmp_path / "a").touch()
    with assert_refused(f"{tmp_path}: a.tar cannot be unpacked there", tmp_path / "a", lines=1):
        unpack(archive, tmp_path)
    assert names(tmp_path) == ["a", "a.tar"]


MALICIOUS = {
    "absolute name": [("/outside", b"x")],
    "absolute name here": [("{root}/outside", b"x")],
    "name above": [("../outside", b"x")],
    "name that goes through above": [("a/../../outside", b"x")],
    "folder above": [("../outside", None)],
    "symbolic link": [("a", tarfile.SYMTYPE, "../outside")],
    "hard link": [("b", b"x"), ("a", tarfile.LNKTYPE, "b")],
    "file through a link": [("a", tarfile.SYMTYPE, ".."), ("a/outside", b"x")],
    "device": [("a", tarfile.CHRTYPE, "")],
    "block device": [("a", tarfile.BLKTYPE, "")],
    "pipe": [("a", tarfile.FIFOTYPE, "")],
    "sparse file": [("a", tarfile.GNUTYPE_SPARSE, "")],
    "the folder that it is unpacked in": [(".unpacking-bad.tar", b"x"), (".unpacking-bad.tgz", b"x")],
    "NUL": [("é\0a", b"x")],
    "file that is a folder": [("a", b"x"), ("a/b", b"x")],
    "folder that is a file": [("a/b", b"x"), ("a", b"x")],
    "folder and file": [("a", None), ("a", b"x")],
    "file in the place of the top": [("./", tarfile.REGTYPE, "")],
}


@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("suffix", [".tar", ".tgz"])
def test_a_malicious_archive_leaves_no_trace(tmp_path, kind, suffix):
    members = [(name.format(root=tmp_path), *what) for name, *what in MALICIOUS[kind]]
    archive = pack(tmp_path / f"bad{suffix}", ("fine", b"x"), *members)
    with assert_refused(archive, "do not trust it", lines=1):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == [archive.name, "data"]


def test_a_size_below_zero_is_refused(tmp_path):
    header = bytearray(tarfile.TarInfo("a").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(header + bytes(1024))
    with assert_refused(tmp_path / "a.tar", lines=1):
        unpack(tmp_path / "a.tar", tmp_path / "data")
    assert names(tmp_path) == ["a.tar", "data"]


NAMES = st.text(st.one_of(st.sampled_from("ab./"), st.characters(codec="utf-8")), max_size=8) | st.sampled_from(
    ["..", "../x", "/x", "a/../../x", "./x", "a//x", "a/", ".unpacking-a.tar", "x" * 300]
)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from([b"x", None]))
        | st.tuples(NAMES, st.sampled_from([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.REGTYPE]), NAMES),
        max_size=4,
    )
)
def test_nothing_is_ever_written_outside_the_folder(members):
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        folder = root / "1" / "2" / "3"
        folder.mkdir(parents=True)
        archive = pack(folder / "a.tar", *members)
        try:
            unpack(archive, folder)
        except UserError:
            assert names(folder) == ["a.tar"]
        assert [name for name in names(root) if not name.startswith("1/2/3/")] == ["1", "1/2", "1/2/3"]
        assert not any(path.is_symlink() for path in folder.rglob("*"))
        assert not (folder / ".unpacking-a.tar").exists()


def broken_header(whole):
    second = whole.index(b"second")
    return whole[: second + 148] + b"x" + whole[second + 149 :]


DAMAGE = {
    "a.tar": {
        "cut in a file": lambda whole: whole[:1000],
        "cut between files": lambda whole: whole[: whole.index(b"second")],
        "cut in a header": lambda whole: whole[: whole.index(b"second") + 99],
        "broken header": broken_header,
        "empty": lambda whole: b"",
        "no archive": lambda whole: CONTENT,
    },
    "a.tar.gz": {
        "cut": lambda whole: whole[: len(whole) // 2],
        "cut at the end": lambda whole: whole[:-4],
        "wrong checksum": lambda whole: whole[:-8] + bytes(4) + whole[-4:],
        "flipped bytes": lambda whole: whole[:20_000] + b"flip" + whole[20_004:],
        "broken header": lambda whole: gzip.compress(broken_header(gzip.decompress(whole))),
    },
}


@pytest.mark.parametrize(("name", "damage"), [(name, damage) for name in DAMAGE for damage in DAMAGE[name]])
def test_a_damaged_archive_is_named_and_leaves_no_trace(tmp_path, name, damage):
    archive = pack(tmp_path / name, ("first", CONTENT), ("second", CONTENT[::-1]))
    archive.write_bytes(DAMAGE[name][damage](archive.read_bytes()))
    with assert_refused(f"{archive}: is cut short, damaged or no tar archive", lines=1):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == [name, "data"]


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    archive = pack(tmp_path / "a.tgz", ("a", bytes(60_000)), ("b", bytes(60_000)))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage(200_000, 80_001, 119_999))
    with assert_refused(f"{tmp_path / 'data'}: a.tgz needs 120000 bytes there, and 119999 are free", lines=1):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == ["a.tgz", "data"]


def test_an_interruption_leaves_no_trace(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(pack(tmp_path / "a.tar", ("a", b"x")), tmp_path / "data")
    assert names(tmp_path) == ["a.tar", "data"]


# Remembering


@pytest.fixture
def hashed(monkeypatch):
    """Names of the files that have been read to be hashed."""
    read, hashes = [], download._hashes

    def noting(path):
        read.append(path.name)
        return hashes(path)

    monkeypatch.setattr(download, "_hashes", noting)
    return read


def touch(path, seconds):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + seconds * 10**9))


def test_a_file_is_hashed_once(tmp_path, hashed):
    file = tmp_path / "sub" / "file"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert [Ledger(tmp_path).check(file) for _ in range(3)] == [sha256] * 3
    assert Ledger(tmp_path).check(file, md5=MD5) == sha256
    assert hashed == ["file"]
    status = file.stat()
    noted = {"sha256": sha256, "md5": MD5, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
    assert json.loads((tmp_path / "hashes.json").read_text()) == {"sub/file": noted}
    assert names(tmp_path) == ["hashes.json", "sub", "sub/file"]


def test_the_same_content_at_another_time_is_accepted(tmp_path, hashed):
    (tmp_path / "file").write_bytes(CONTENT)
    first = Ledger(tmp_path).check(tmp_path / "file")
    touch(tmp_path / "file", 1)
    assert [Ledger(tmp_path).check(tmp_path / "file") for _ in range(2)] == [first] * 2
    assert hashed == ["file"] * 2


def test_changed_content_is_refused_until_its_entry_is_deleted(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    first = Ledger(tmp_path).check(file)
    file.write_bytes(CONTENT[::-1])
    touch(file, 1)
    for _ in range(2):
        with assert_refused(f"{file}: has changed since it was first used", first, tmp_path / "hashes.json"):
            Ledger(tmp_path).check(file)
    (tmp_path / "hashes.json").unlink()
    assert Ledger(tmp_path).check(file) == hashlib.sha256(CONTENT[::-1]).hexdigest()


def test_a_published_file_is_known_by_its_hash_alone(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"wrong")
    with assert_refused(
        f"{file}: has another content than was published (md5 ", f"instead of {MD5}", "remove it", lines=1
    ):
        Ledger(tmp_path).check(file, md5=MD5)
    assert names(tmp_path) == ["file"]
    Ledger(tmp_path).check(file)
    with assert_refused(f"instead of {MD5}", lines=1):
        Ledger(tmp_path).check(file, md5=MD5)
    file.write_bytes(CONTENT)
    assert Ledger(tmp_path).check(file, md5=MD5) == hashlib.sha256(CONTENT).hexdigest()


def test_a_tree_of_files_is_hashed_as_a_whole(tmp_path, hashed):
    tree = tmp_path / "tree"
    for name in ("b", "a/y", "a/x", "é"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    listed = "".join(f"{name}\0{hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("a/x", "a/y", "b", "é"))
    ledger = Ledger(tmp_path)
    first = ledger.check(tree)
    assert first == hashlib.sha256(listed.encode()).hexdigest()
    assert sorted(hashed) == ["b", "tree", "x", "y", "é"]
    touch(tree / "a" / "x", -1)
    assert ledger.check(tree) == first
    (tree / "a" / "y").rename(tree / "a" / "z")
    with assert_refused(f"{tree}: has changed"):
        ledger.check(tree)


def test_a_ledger_does_not_count_itself(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert Ledger(tmp_path).check(tmp_path) == Ledger(tmp_path).check(tmp_path)
    assert list(json.loads((tmp_path / "hashes.json").read_text())) == ["."]


def test_a_folder_that_cannot_be_written_to_is_read_with_one_warning(tmp_path, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise UserError(f"{path.parent}: cannot be written to")

    monkeypatch.setattr(download, "write_atomically", refuse)
    for name in ("a", "b", "a"):
        (tmp_path / name).write_bytes(CONTENT)
        assert Ledger(tmp_path).check(tmp_path / name) == hashlib.sha256(CONTENT).hexdigest()
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1}', '{"a": {"size": 3}}', "\udcff"])
def test_a_damaged_ledger_is_named(tmp_path, text):
    (tmp_path / "file").touch()
    (tmp_path / "hashes.json").write_text(text, errors="surrogateescape")
    with assert_refused(tmp_path / "hashes.json", "damaged", "delete it", lines=1):
        Ledger(tmp_path).check(tmp_path / "file")


def test_entries_of_other_processes_are_kept(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    hashes = download._hashes

    def meanwhile(path):
        monkeypatch.setattr(download, "_hashes", hashes)
        Ledger(tmp_path).check(tmp_path / "b")
        return hashes(path)

    monkeypatch.setattr(download, "_hashes", meanwhile)
    Ledger(tmp_path).check(tmp_path / "a")
    assert list(json.loads((tmp_path / "hashes.json").read_text())) == ["a", "b"]


def test_only_what_is_below_the_folder_is_noted(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        Ledger(tmp_path / "data").check(tmp_path / "data" / ".." / "file")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with assert_refused(f"{tmp_path / 'file'}: cannot be read (No such file or directory)", lines=1):
        Ledger(tmp_path).check(tmp_path / "file")


def test_a_file_whose_sha256_is_known_is_that_file(tmp_path):
    """Also after another was noted: what is said of it now counts."""
    file = tmp_path / "file"
    file.write_bytes(b"first")
    Ledger(tmp_path).check(file)
    file.write_bytes(CONTENT)
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert Ledger(tmp_path).check(file, sha256=sha256) == sha256
    with assert_refused(f"(sha256 {sha256} instead of {'0' * 64})", lines=1):
        Ledger(tmp_path).check(file, sha256="0" * 64)


def test_who_has_a_folder_for_itself_may_fetch_and_unpack_there(server, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    with download._alone(tmp_path):
        assert Downloads().fetch(server.remote, tmp_path).read_bytes() == CONTENT
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def archive_of(tmp_path, *folders):
    """A mirror with an archive of a file in each of these folders, and what is published of it."""
    archive = tmp_path / "public" / "set.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in folders:
            member = tarfile.TarInfo(f"{name}/file")
            member.size = len(CONTENT)
            tar.addfile(member, io.BytesIO(CONTENT))
    remote = Remote(
        "http://nowhere.invalid/set.tar", archive.stat().st_size, hashlib.md5(archive.read_bytes()).hexdigest()
    )
    return Downloads(archive.parent.as_uri()), remote


def test_folders_of_an_archive_are_fetched_once_and_it_is_not_kept(tmp_path):
    downloads, remote = archive_of(tmp_path, "a", "b")
    data = tmp_path / "data"
    for _ in range(2):
        assert downloads.fetch_unpacked(remote, data, ("a", "b")) == [data / "a", data / "b"]
        assert names(data) == ["a", "a/file", "b", "b/file"]
        (tmp_path / "public" / "set.tar").unlink(missing_ok=True)
    with assert_refused("set.tar: is not there", "by hand"):
        Downloads(allowed=False).fetch_unpacked(remote, tmp_path / "other", ("a",))
    assert not (tmp_path / "other").exists(), "nothing is made where nothing may be fetched"


def test_an_archive_that_lay_there_is_kept(tmp_path):
    _, remote = archive_of(tmp_path, "a")
    Downloads(allowed=False).fetch_unpacked(remote, tmp_path / "public", ("a",))
    assert names(tmp_path / "public") == ["a", "a/file", "set.tar"]
    with assert_refused("set.tar: does not hold c", lines=1):
        Downloads(allowed=False).fetch_unpacked(remote, tmp_path / "public", ("a", "c"))


@pytest.mark.parametrize(("there", "kept"), [((), False), (("a",), False), (("b",), False), (("a",), True)])
def test_killed_at_any_step_it_is_whole_or_is_mended(tmp_path, there, kept):
    """A folder that a person has begun to fill is there already, or none; and the archive may be that person's."""
    downloads, remote = archive_of(tmp_path, "a", "b")
    data, killed, archives = tmp_path / "data", 0, []
    for number in itertools.count(1):
        for name in ("", *there):
            (data / name).mkdir(parents=True)
        if kept:
            shutil.copy(tmp_path / "public" / "set.tar", data)
        on = killed_before_step(number, lambda: downloads.fetch_unpacked(remote, data, ("a", "b")))
        killed += on
        if (data / "a").is_dir() and (data / "b").is_dir():
            assert [(data / name / "file").read_bytes() for name in ("a", "b")] == [CONTENT] * 2, f"step {number}"
        downloads.fetch_unpacked(remote, data, ("a", "b"))
        lying = [name for name in names(data) if not name.startswith(".unpacking-") or (data / name).is_file()]
        assert lying[:4] == ["a", "a/file", "b", "b/file"], f"step {number}"
        assert lying[4:] in ([], ["set.tar"]), f"step {number}"
        archives.append(lying[4:])
        assert [(data / name / "file").read_bytes() for name in ("a", "b")] == [CONTENT] * 2
        shutil.rmtree(data)
        if not on:
            break
    assert killed > 5
    assert all(archives) if kept else sum(map(len, archives)) <= 2, "known as fetched but for two instants"


def test_several_that_want_an_archive_unpacked_wait_for_each_other(tmp_path):
    pytest.importorskip("fcntl")
    downloads, remote = archive_of(tmp_path, "a", "b")
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: downloads.fetch_unpacked(remote, tmp_path / "data", ("a", "b")), range(6)))
    assert found == [[tmp_path / "data" / "a", tmp_path / "data" / "b"]] * 6
    assert names(tmp_path / "data") == ["a", "a/file", "b", "b/file"]


def test_what_cannot_be_put_anywhere_is_missing(tmp_path):
    downloads, remote = archive_of(tmp_path, "a")
    (tmp_path / "file").write_bytes(b"")
    for fetch in (downloads.fetch, lambda *asked: downloads.fetch_unpacked(*asked, ("a",))):
        with pytest.raises(download.Missing, match="file: cannot be read or written"):
            fetch(remote, tmp_path / "file")
