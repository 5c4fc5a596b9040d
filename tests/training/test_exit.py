"""Exit statuses and messages of scripts: user errors, signals, closed pipes, several processes."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import (
    ROOT,
    TINY,
    _start,
    free_port,
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
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}
WORD = {signal.SIGINT: "\ninterrupted", signal.SIGTERM: "terminated", signal.SIGUSR1: "terminated"}


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("script", ["main.py", "evaluate.py"])
def test_a_signal_during_imports_exits_without_a_message(start_process, monkeypatch, tmp_path, script, number):
    """While torch is imported: here one that never gets ready."""
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(1000)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = start_process(script)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    assert process.communicate(timeout=100) == ("", "")
    assert process.returncode == {signal.SIGINT: -signal.SIGINT, signal.SIGUSR1: 143}[number]


def after_begin(code, **variables):
    """What a script prints to stdout that begins as ours do."""
    command = [sys.executable, "-c", f"from training.signals import begin; begin(); {code}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_what_stdout_cannot_encode_is_printed_as_escapes():
    code = r"print('caf\udce9', chr(0x732b))"
    assert after_begin(code, PYTHONIOENCODING="latin-1", PYTHONUTF8="0") == b"caf\\udce9 \\u732b\n"
    assert after_begin(code, PYTHONIOENCODING="utf-8") == "caf\\udce9 猫\n".encode()


def test_figures_are_drawn_whatever_backend_a_notebook_exports():
    code = "from analysis.figures import new_figure; print(type(new_figure(1, 1)).__name__)"
    assert after_begin(code, MPLBACKEND="module://matplotlib_inline.backend_that_is_not_here") == b"Figure\n"


# Before the processes have met


def alone_of_two(port, rank, host="127.0.0.1"):
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": str(port)}
    with processes.join("cpu"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", STATUS)
def test_a_signal_ends_a_process_that_waits_for_others(end, number, rank):
    def wait_alone():
        time.sleep = lambda _: send_while_waiting()
        alone_of_two(port, rank)

    def send_while_waiting():
        os.kill(os.getpid(), number)

    port = free_port()
    status, err = end(wait_alone)
    assert status == STATUS[number]
    assert err.endswith(f"{WORD[number]}\n")
    assert "Traceback" not in err


def test_a_taken_port_is_named(end):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, err = end(lambda: alone_of_two(port, 0))
    message = (
        f"error: MASTER_PORT: 127.0.0.1:{port} is in use by another program; choose another port with --master_port"
    )
    assert (status, err.splitlines()[-1]) == (2, message)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_host_is_named(end, rank):
    status, err = end(lambda: alone_of_two(29500, rank, host="no such machine"))
    assert status == 2
    assert "MASTER_ADDR: 'no such machine' is not known on this machine" in err
    assert len(err.splitlines()) == 1


def test_a_process_that_fails_early_ends_those_that_wait():
    def run():
        exits.exit_with_status(fail if os.environ["RANK"] == "1" else wait_for_all)

    def fail():
        raise UserError("there is no such conf file")

    def wait_for_all():
        with processes.join("cpu"):
            pass

    done = start_ranks(3, run)
    assert [rank.status for rank in done] == [2, 2, 2]
    assert "".join(rank.err for rank in done) == "error: process 1: there is no such conf file\n"
