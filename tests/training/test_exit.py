"""Exit statuses and messages of scripts: user errors, signals, closed pipes, several processes."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import (
    ROOT,
    TINY,
    _start,
    scripts_on_ranks,
    start_ranks,
)

import training.distributed as processes
import training.exit as exits
from utils import UserError


def test_an_error_of_one_process_ends_all_with_its_message():
    def fail_in_one(world):
        if world.rank == 1:
            raise UserError("the disk of this machine is full")
        world.gather("waiting for the other")

    def run():
        exits.exit_with_status(lambda: fail_joined())

    def fail_joined():
        with processes.join("cpu") as world:
            fail_in_one(world)

    done = start_ranks(3, run)
    assert [rank.status for rank in done] == [2, 2, 2]
    assert "".join(rank.err for rank in done) == "error: process 1: the disk of this machine is full\n"


def test_an_error_of_all_processes_is_printed_once(tmp_path):
    done = scripts_on_ranks(3, "main.py", "--logdir", tmp_path / "logs", "--set", *TINY)
    assert [rank.status for rank in done] == [2, 2, 2]
    (message,) = filter(None, (rank.err for rank in done))
    assert "batch_size: 10 images cannot be split over 3 processes" in message
    done = scripts_on_ranks(2, "main.py", "--ampp")
    (message,) = filter(None, (rank.err for rank in done))
    assert "did you mean --amp?" in message
    assert not (tmp_path / "logs").exists()


def test_a_killed_process_ends_the_others_in_one_line():
    def run():
        exits.exit_with_status(joined)

    def joined():
        with processes.join("cpu") as world:
            if world.rank == 1:
                time.sleep(0.5)
                raise SystemExit(9)  # without a word to the others
            world.gather("waiting for the other")

    first, second = start_ranks(2, run)
    assert second.status == 9
    assert first.status == 2
    assert first.err == "error: another process ended or does not answer; was it killed, or out of memory?\n"


FORKING = multiprocessing.get_context("fork")
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
WORD = {signal.SIGINT: "\ninterrupted", signal.SIGTERM: "terminated"}


@pytest.fixture
def end(tmp_path):
    """How a process ends whose main() this is, and what it writes to stderr: end(function) -> (status, text).

    out: descriptor for its stdout. before: to be called first.
    """

    def run(function, out=None, before=lambda: None):
        def start():
            os.dup2(os.open(tmp_path / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            if out is not None:
                os.dup2(out, 1)
                sys.stdout = os.fdopen(1, "w")
            os.chdir(ROOT)
            before()
            exits.exit_with_status(function)

        process = FORKING.Process(target=start)
        _start(process)
        process.join(100)
        ended, status = not process.is_alive(), process.exitcode
        process.kill()
        assert ended, "goes on"
        return status, (tmp_path / "stderr").read_text()

    return run


def send(number, to=None):
    """A signal, which has arrived when this returns."""
    os.kill(to or os.getpid(), number)
    time.sleep(0)


def wait():
    """For a signal; one that comes just before a sleep does not cut it short."""
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("number", STATUS)
def test_ctrl_c_and_sigterm_end_alike(end, number):
    def describe():
        try:
            send(number)
        except KeyboardInterrupt as stop:
            raise type(stop)("all is kept") from None

    assert end(lambda: send(number)) == (STATUS[number], f"{WORD[number]}\n")
    assert end(describe) == (STATUS[number], f"{WORD[number]}; all is kept\n")


@pytest.mark.parametrize("number", STATUS)
def test_signal_handlers_are_restored(number, capsys):
    before = [signal.getsignal(each) for each in STATUS]
    with pytest.raises(SystemExit) as leaving:
        exits.exit_with_status(lambda: send(number))
    assert leaving.value.code == STATUS[number]
    assert capsys.readouterr().err == f"{WORD[number]}\n"
    assert [signal.getsignal(each) for each in STATUS] == before


@pytest.mark.parametrize("number", STATUS)
def test_a_second_ctrl_c_interrupts_the_cleanup(end, number):
    def never_ready():
        try:
            send(number)
        finally:
            send(signal.SIGINT)
            wait()

    assert end(never_ready) == (130, "\ninterrupted\n")


def test_a_forked_child_has_the_default_handlers(end):
    def main():
        child = os.fork()
        if not child:
            send(signal.SIGTERM)
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]), file=sys.stderr)

    assert end(main) == (0, f"{int(signal.SIGTERM)}\n")


@pytest.fixture
def closed():
    """A pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("flushed", [False, True])
def test_a_closed_pipe_ends_without_a_message(end, closed, flushed):
    """`| head`: at the end, or at once as with PYTHONUNBUFFERED."""
    assert end(lambda: print("something", flush=flushed), out=closed) == (141, "")


def test_a_message_without_a_reader_keeps_its_status(end, closed):
    """`2>&1 | head`."""

    def fail():
        raise UserError("nobody will know")

    assert end(fail, before=lambda: os.dup2(closed, 2)) == (2, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_output_on_a_full_disk_is_an_error(end):
    full = os.open("/dev/full", os.O_WRONLY)
    assert end(lambda: print("something"), out=full) == (2, "error: [Errno 28] No space left on device\n")
    os.close(full)


@pytest.mark.parametrize("script", ["main.py", "evaluate.py", "experiments.py", "report.py"])
def test_a_missing_package_is_named_with_its_command(script):
    """-S: without the packages that are installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", script]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: PyTorch is not installed; run: pip install -r requirements.txt\n"


@pytest.mark.parametrize("script", ["main.py", "evaluate.py"])
def test_ctrl_c_during_imports_exits_without_a_message(start_process, monkeypatch, tmp_path, script):
    """While torch is imported: here one that never gets ready."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_process(script)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100) == ("", "")
    assert process.returncode == -signal.SIGINT
