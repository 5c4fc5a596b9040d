"""One writer at a time: processes that wait, end, fork and are killed."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket

import pytest
from conftest import _start

import training.lock as locks
from training.lock import RUN_LOCK, sole_writer
from utils import UserError

pytest.importorskip("fcntl")
FORKING = multiprocessing.get_context("fork")
HERE, REMEDY = socket.gethostname(), "use another --name"


@pytest.fixture
def fork():
    """fork(function, *arguments) runs function(pipe, *arguments) in a process -> the process, our end of the pipe."""
    processes = []

    def start(function, *arguments):
        ours, theirs = FORKING.Pipe()
        processes.append(FORKING.Process(target=function, args=(theirs, *arguments)))
        _start(processes[-1])
        theirs.close()
        return processes[-1], ours

    yield start
    for process in processes:
        process.kill()
        process.join()


def refusal(target):
    """The message for a process that tries to lock `target`; None if it may."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(target, REMEDY))
        except UserError as error:
            return str(error)
    return None


def test_a_run_and_the_files_in_it_have_separate_locks(tmp_path):
    """A process is refused a lock that it holds already, also through a link."""
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "link").symlink_to("run")
    with sole_writer(run, ""), sole_writer(run / "results.json", ""), sole_writer(run / "other.json", ""):
        assert {path.name for path in run.iterdir()} == {RUN_LOCK, "results.json.lock", "other.json.lock"}
        assert f"is being written by process {os.getpid()} on {HERE}" in refusal(run)
        assert refusal(tmp_path / "link") is not None
        assert refusal(tmp_path / "run.json") is None
    with pytest.raises(ZeroDivisionError), sole_writer(run, REMEDY):
        raise ZeroDivisionError
    assert list(run.iterdir()) == []


def fork_and_wait(pipe, target):
    """Hold `target` with two children, as DataLoader workers would be: one leaves the context, one waits."""
    with sole_writer(target, REMEDY):
        leaving = os.fork()
        if leaving:
            os.waitpid(leaving, 0)
            if child := os.fork():
                pipe.send(child)
            signal.pause()
    os._exit(0)


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path, fork):
    """Children of the first do not matter."""
    first, pipe = fork(fork_and_wait, tmp_path)
    child = pipe.recv()
    try:
        expected = f"{tmp_path}: is being written by process {first.pid} on {HERE}\nwait for it to end, stop it, or "
        assert refusal(tmp_path) == expected + REMEDY
        first.kill()
        first.join()
        assert (tmp_path / RUN_LOCK).exists()
        assert refusal(tmp_path) is None
        os.kill(child, 0)  # the waiting child is still there
    finally:
        os.kill(child, signal.SIGKILL)


def count_up(pipe, target, times):
    """Increment a number in a file, in steps that show when two processes overlap."""
    number, alone = target / "number", target / "locked"
    while times:
        try:
            with sole_writer(target, REMEDY):
                alone.mkdir()
                before = int(number.read_text())
                os.sched_yield()
                number.write_text(str(before + 1))
                alone.rmdir()
            times -= 1
        except UserError:
            os.sched_yield()
    pipe.send("done")


def test_one_of_many_processes_at_a_time_holds_the_lock(tmp_path, fork):
    (tmp_path / "number").write_text("0")
    pipes = [fork(count_up, tmp_path, 20)[1] for _ in range(6)]
    assert [pipe.recv() for pipe in pipes] == ["done"] * 6
    assert (tmp_path / "number").read_text() == "120"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


@pytest.mark.parametrize("text", ["", "\0\xff" * 5000, "process 77 on node7\nand more\n"])
def test_a_lock_file_that_no_process_holds_is_reused(tmp_path, text):
    (tmp_path / RUN_LOCK).write_text(text)
    with sole_writer(tmp_path, REMEDY):
        assert (tmp_path / RUN_LOCK).read_text() == f"process {os.getpid()} on {HERE}\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("posix", [True, False])
def test_without_locks_there_is_a_warning(tmp_path, monkeypatch, capsys, posix):
    def without_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if posix:
        monkeypatch.setattr(locks.fcntl, "lockf", without_locks)
    else:
        monkeypatch.setattr(locks, "fcntl", None)
    assert refusal(tmp_path) is None
    assert f"warning: {tmp_path / RUN_LOCK}: cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_lock_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / RUN_LOCK).mkdir()
    assert refusal(tmp_path) == f"{tmp_path / RUN_LOCK}: cannot be written (Is a directory); {REMEDY}"
    (tmp_path / "valuable").write_text("keep")
    (tmp_path / "a.json.lock").symlink_to("valuable")
    assert f"{tmp_path / 'a.json.lock'}: cannot be written" in refusal(tmp_path / "a.json")
    assert (tmp_path / "valuable").read_text() == "keep"
    assert "b.json.lock: cannot be written (No such file" in refusal(tmp_path / "nowhere" / "b.json")
