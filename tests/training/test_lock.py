"""One writer at a time, in processes that come, go and are killed; with the system's locks and without."""

import contextlib
import errno
import multiprocessing
import os
import signal
import socket

import pytest
from conftest import _start

import training.lock as locks
from training.lock import RUN_LOCK, Holder, sole_writer
from utils import UserError

pytest.importorskip("fcntl")
FORKING = multiprocessing.get_context("fork")
HERE, REMEDY = socket.gethostname(), "use another --name"
DEAD = 4_194_304  # one more than Linux numbers processes with


@pytest.fixture(params=["locks", "no locks"])
def system(request, monkeypatch):
    """The file system with its locks, and one that has none."""
    if request.param == "no locks":
        monkeypatch.setattr(locks.fcntl, "lockf", without_locks)
    return request.param


def without_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture
def fork():
    """Start function(pipe, *arguments) in a process of its own -> the process and the other end of its pipe."""
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


def hold(pipe, target):
    """Say how it went; as the holder, wait for a word to leave."""
    try:
        with sole_writer(target, REMEDY):
            pipe.send("holds")
            pipe.recv()
        pipe.send("has left")
    except UserError as error:
        pipe.send(str(error))


def refusal(target):
    """What a process is told that tries to hold `target` here; None where it may."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(sole_writer(target, REMEDY))
        except UserError as error:
            message = str(error)
        else:
            return None
    assert len(message.splitlines()) <= 2
    return message


def line(process, host=HERE, started=5):
    return f"process {process} on {host}, started at tick {started}, since 2020-02-02T02:02:02+00:00\n"


def started(process):
    return locks._state_and_start(process)[1]


def test_a_second_process_is_told_of_the_first(tmp_path, fork, system):
    first, pipe = fork(hold, tmp_path)
    assert pipe.recv() == "holds"
    told = fork(hold, tmp_path)[1].recv()
    assert told.startswith(f"{tmp_path}: is being written by process {first.pid} on {HERE} (since 20")
    assert told.endswith(f"\nwait for it to end, stop it, or {REMEDY}")
    pipe.send("leave")
    assert pipe.recv() == "has left"
    assert list(tmp_path.iterdir()) == []
    assert fork(hold, tmp_path)[1].recv() == "holds"


def test_a_run_and_files_in_its_directory_have_locks_of_their_own(tmp_path):
    (tmp_path / "a").mkdir()
    targets = [tmp_path / "a", tmp_path / "a" / "results.json", tmp_path / "a" / "mine.json", tmp_path / "a.json"]
    with sole_writer(targets[0], ""), sole_writer(targets[1], ""), sole_writer(targets[2], ""):
        assert refusal(targets[3]) is None
        lying = {path.name for path in (tmp_path / "a").iterdir()}
        assert lying == {RUN_LOCK, "results.json.lock", "mine.json.lock"}
    assert list((tmp_path / "a").iterdir()) == []


def test_a_process_is_refused_what_it_holds_itself(tmp_path, system):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with sole_writer(tmp_path / "run", REMEDY):
        for name in ("run", "link"):
            assert f"by process {os.getpid()} on {HERE}" in refusal(tmp_path / name)
    assert refusal(tmp_path / "run") is None


def test_a_lock_ends_with_an_error(tmp_path, system):
    with pytest.raises(ZeroDivisionError), sole_writer(tmp_path, REMEDY):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    assert refusal(tmp_path) is None


def test_what_a_killed_process_leaves_hinders_nobody(tmp_path, fork, system, capsys):
    first, pipe = fork(hold, tmp_path)
    assert pipe.recv() == "holds"
    first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is still in the list of processes
    assert (tmp_path / RUN_LOCK).read_text().startswith(f"process {first.pid} on ")
    assert refusal(tmp_path) is None
    assert capsys.readouterr().err == ""


def fork_and_wait(pipe, target):
    """Hold `target` with a child, as a DataLoader's worker would be; the child waits to be killed."""
    with sole_writer(target, REMEDY):
        if child := os.fork():
            pipe.send(child)
        signal.pause()


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path, fork, system):
    first, pipe = fork(fork_and_wait, tmp_path)
    child = pipe.recv()
    try:
        assert f"process {first.pid} " in refusal(tmp_path)
        first.kill()
        first.join()
        assert refusal(tmp_path) is None
        os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)


def fork_one_that_leaves(pipe, target):
    with sole_writer(target, REMEDY):
        if child := os.fork():
            pipe.send(os.waitpid(child, 0)[1])
            pipe.recv()
        else:
            told = [refusal(target)]
    if child == 0:
        told.append(refusal(target))
        os._exit(0 if all(text and f"process {os.getppid()} " in text for text in told) else 1)


def test_a_child_that_leaves_does_not_end_the_lock(tmp_path, fork, system):
    first, pipe = fork(fork_one_that_leaves, tmp_path)
    assert pipe.recv() == 0, "and is refused like any other"
    assert f"process {first.pid} " in refusal(tmp_path)


def count_up(pipe, target, times):
    """Add to a number in a file, in steps that would be seen to mix with those of another process."""
    number, alone = target / "number", target / "somebody is at work"
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
    pipe.send("well")


def test_of_many_processes_one_at_a_time_gets_in(tmp_path, fork, system):
    (tmp_path / "number").write_text("0")
    (tmp_path / RUN_LOCK).write_text(line(DEAD))
    pipes = [fork(count_up, tmp_path, 20)[1] for _ in range(8)]
    assert [pipe.recv() for pipe in pipes] == ["well"] * 8
    assert (tmp_path / "number").read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


STALE = {
    "one that has ended": line(DEAD),
    "another that was given its number": line(os.getppid()),
    "this process's number, from before": line(os.getpid()),
}


@pytest.mark.parametrize("of", STALE)
def test_a_file_of_a_process_that_has_ended_is_taken_over(tmp_path, system, of, capsys):
    (tmp_path / RUN_LOCK).write_text(STALE[of] + "and more lines\n" * 20)
    with sole_writer(tmp_path, REMEDY):
        holder = Holder.this()._replace(since="")
        text = (tmp_path / RUN_LOCK).read_text()
    assert text.startswith(f"process {holder.process} on {HERE}, started at tick {holder.started}, since 20")
    assert text.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "text", ["", "garbage", "\0\xff" * 5000, "process 1 on", line("9" * 400), line(0), line(-1), line(1)[:-1]]
)
def test_a_file_that_names_nobody(tmp_path, system, text):
    """With locks whoever wrote it has ended; without, nobody knows."""
    (tmp_path / RUN_LOCK).write_text(text)
    told = refusal(tmp_path)
    if system == "locks":
        assert told is None
    else:
        assert told.startswith(
            f"{tmp_path / RUN_LOCK}: does not say which process is writing there; if none is, remove"
        )
        assert told.endswith(REMEDY)
        assert (tmp_path / RUN_LOCK).read_text() == text


def test_a_file_of_another_host(tmp_path, system, capsys):
    """With locks it is free, unless they do not reach that far; without, nobody knows."""
    (tmp_path / RUN_LOCK).write_text(line(77, "node7"))
    told = refusal(tmp_path)
    if system == "locks":
        assert told is None
        warning = capsys.readouterr().err
        assert f"warning: {tmp_path / RUN_LOCK}: was left by process 77 on node7 (since 2020-" in warning
        assert warning.count("\n") == 1
    else:
        assert f"{RUN_LOCK}: says process 77 on node7 (since 2020-02-02T02:02:02+00:00) is writing there" in told
        assert "remove the file" in told
        assert (tmp_path / RUN_LOCK).exists()


def test_a_process_of_somebody_else_is_alive(tmp_path, monkeypatch):
    """Also where the system does not show its state."""

    def not_ones_own(*_):
        raise PermissionError

    monkeypatch.setattr(locks.fcntl, "lockf", without_locks)
    monkeypatch.setattr(locks.os, "kill", not_ones_own)
    (tmp_path / RUN_LOCK).write_text(line(os.getppid(), started=started(os.getppid())))
    assert f"by process {os.getppid()} on {HERE}" in refusal(tmp_path)
    monkeypatch.setattr(locks, "_state_and_start", lambda _: None)
    (tmp_path / RUN_LOCK).write_text(line(os.getppid()))
    assert f"by process {os.getppid()} on {HERE}" in refusal(tmp_path)


def lock_in_silence(pipe, path):
    """As one does that was stopped before it could write its name."""
    descriptor = os.open(path, os.O_RDWR)
    locks.fcntl.lockf(descriptor, locks.fcntl.LOCK_EX)
    pipe.send("locked")
    pipe.recv()


@pytest.mark.parametrize("text", ["", line(DEAD)])
def test_a_holder_that_has_not_written_its_name_yet_is_not_taken_for_the_one_before(tmp_path, fork, text):
    (tmp_path / RUN_LOCK).write_text(text)
    pipe = fork(lock_in_silence, tmp_path / RUN_LOCK)[1]
    assert pipe.recv() == "locked"
    assert refusal(tmp_path).startswith(f"{tmp_path}: is being written by another process\n")


def read_ones_own(pipe, target):
    with sole_writer(target, REMEDY):
        (target / RUN_LOCK).read_bytes()  # and closed, with which the system's lock is gone
        pipe.send("has read")
        pipe.recv()


def test_a_holder_that_has_read_its_file_is_still_the_holder(tmp_path, fork):
    first, pipe = fork(read_ones_own, tmp_path)
    assert pipe.recv() == "has read"
    assert f"process {first.pid} " in refusal(tmp_path)


def test_a_lock_that_others_have_removed_and_made_anew_is_theirs(tmp_path, system):
    with sole_writer(tmp_path, REMEDY):
        (tmp_path / RUN_LOCK).unlink()
        (tmp_path / RUN_LOCK).write_text("theirs")
    assert (tmp_path / RUN_LOCK).read_text() == "theirs"
    with sole_writer(tmp_path / "results.json", REMEDY):
        (tmp_path / "results.json.lock").unlink()


def test_a_file_that_is_removed_while_one_waits_for_it_is_made_anew(tmp_path, monkeypatch):
    path, lockf, locked = tmp_path / RUN_LOCK, locks.fcntl.lockf, []
    path.write_text(line(DEAD))

    def removed_meanwhile(descriptor, how):
        if not locked:
            path.unlink()
        lockf(descriptor, how)
        locked.append(descriptor)

    monkeypatch.setattr(locks.fcntl, "lockf", removed_meanwhile)
    with sole_writer(tmp_path, REMEDY):
        assert len(locked) == 2
        assert path.exists()


@pytest.mark.parametrize("has_left", [False, True])
def test_two_that_take_over_at_once_do_not_both_get_in(tmp_path, monkeypatch, has_left):
    """Without locks: the other has removed the old file and made its own before this one moves it aside."""
    path, runs = tmp_path / RUN_LOCK, Holder.runs
    path.write_text(line(DEAD))
    theirs = line(os.getppid(), started=started(os.getppid()))

    def overtaken(holder):
        if holder.process == DEAD:
            path.unlink()
            if not has_left:
                path.write_text(theirs)
            return False
        return runs(holder)

    monkeypatch.setattr(locks.fcntl, "lockf", without_locks)
    monkeypatch.setattr(Holder, "runs", overtaken)
    if has_left:
        assert refusal(tmp_path) is None
        assert list(tmp_path.iterdir()) == []
    else:
        assert f"process {os.getppid()} " in refusal(tmp_path)
        assert path.read_text() == theirs
        assert list(tmp_path.iterdir()) == [path]


def test_a_system_that_is_not_posix_has_no_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks.os, "kill", None)  # ends processes there
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(locks.os, "name", "nt")
        running = Holder(DEAD, HERE, 0, "").runs()
    assert running, "for all that is known"
    assert refusal(tmp_path) is None


def test_what_stands_in_the_way_is_named(tmp_path, monkeypatch):
    (tmp_path / RUN_LOCK).mkdir()
    assert f"{tmp_path / RUN_LOCK}: cannot be written (Is a directory); {REMEDY}" == refusal(tmp_path)
    os.mkfifo(tmp_path / "a.json.lock")
    assert f"{tmp_path / 'a.json.lock'}: is no file; remove it, or {REMEDY}" == refusal(tmp_path / "a.json")
    (tmp_path / "b.json.lock").symlink_to("nowhere")
    assert f"{tmp_path / 'b.json.lock'}: cannot be locked" in refusal(tmp_path / "b.json")
    assert "lock: cannot be written (No such file" in refusal(tmp_path / "nowhere" / "c.json")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks.os, "pwrite", full)
    assert "d.json.lock: cannot be written (No space left on device)" in refusal(tmp_path / "d.json")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    assert f"{tmp_path / RUN_LOCK}: cannot be written (Permission denied); {REMEDY}" == refusal(tmp_path)
    tmp_path.chmod(0o700)
