"""Runs that are killed, stopped, continued with other processes or out of disk space, against an uninterrupted run.

Processes are really killed with -9, signals are sent, disks are full.
"""

import contextlib
import os
import random
import resource
import shlex
import signal
import time

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Ranks,
    as_script,
    assert_refused,
    files,
    final_state,
    free_port,
    launch,
    lines,
    same,
    scripts_on_ranks,
    start_ranks,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import dataloader
import main
import training.checkpoint as checkpoint
import training.signals as stopping
import training.state as trainingstate
import utils
from training.log import RunLog
from utils import UserError

# Noise in the network, intervals across the ends of epochs, checkpoints within them: state that is easily lost.
DEMANDING = (*TINY, "train_size=80", "valid_size=300", "epochs=4", "eval_every=2", "dropout=0.1", "checkpoint_every=3")
DEMANDING += ("policy_interval=5", "controller_lr=0.05")  # 8 steps in an epoch


def said(logdir, name, *flags, settings=DEMANDING):
    return ("main.py", "--logdir", logdir, "--name", name, *flags, "--set", *settings)


def run_whole(size, logdir, name="whole", *flags, settings=DEMANDING):
    done = scripts_on_ranks(size, *said(logdir, name, *flags, settings=settings))
    assert [rank.status for rank in done] == [0] * size, [rank.err for rank in done]
    return logdir / name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(size) -> the directory of an uninterrupted run, trained by so many processes."""
    runs = {}

    def run(size):
        if size not in runs:
            runs[size] = run_whole(size, tmp_path_factory.mktemp("whole"))
        return runs[size]

    return run


def assert_same_run(run, truth):
    """Lines, curves and the last state are the same, bit for bit."""
    assert files(run) == files(truth)
    assert len(lines(run / "times.jsonl")) == len(lines(truth / "times.jsonl"))
    assert same(final_state(run), final_state(truth))
    assert same(utils.load_tensors(run / "model.pt"), utils.load_tensors(truth / "model.pt"))
    curves = [EventAccumulator(str(one), size_guidance={"scalars": 0}).Reload() for one in (run, truth)]
    for name in ("loss/train", "adversary/entropy_share"):
        ours, theirs = ([(event.step, event.value) for event in curve.Scalars(name)] for curve in curves)
        assert ours == theirs, f"{name}: each point once"


# Killed with -9


def kill_at_random(size, arguments, checkpoints, draw):
    """Start a run, and kill it soon after it has written a random number of checkpoints; or in its first moments."""
    before, wanted = set(checkpoints.glob("*.pt")), draw.choice((0, 1, 1, 2, 3))
    with Ranks(size, as_script(*arguments)) as ranks:
        while len(set(checkpoints.glob("*.pt")) - before) < wanted and ranks.processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.2 if wanted else 1.0))
        for process in draw.sample(ranks.processes, size):
            process.kill()
            process.join()


@pytest.mark.parametrize(
    ("size", "kills", "epochs"),
    [
        (1, 2, 3),
        pytest.param(1, 20, 20, marks=pytest.mark.slow),
        pytest.param(2, 5, 8, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_again_and_again_is_the_uninterrupted_one(tmp_path, size, kills, epochs):
    settings = (*DEMANDING, f"epochs={epochs}")
    truth = run_whole(size, tmp_path, settings=settings)
    run, draw = tmp_path / "killed", random.Random(kills)
    for _ in range(kills):
        resume = ("--resume",) if (run / "config.yaml").exists() else ()
        kill_at_random(size, said(tmp_path, "killed", *resume, settings=settings), run / "checkpoints", draw)
    run_whole(size, tmp_path, "killed", "--resume", settings=settings)
    assert_same_run(run, truth)


# Stop requests


def interrupt_within(monkeypatch, where, number=signal.SIGTERM, rank=0):
    """From now on a process sends itself a signal, once: in its tenth step, in the first scoring, or while it saves."""
    holder, name, call = {
        "training": (main, "learn", 10),
        "evaluation": (dataloader.Normalise, "__call__", 17),  # 16 steps have gone before
        "save": (checkpoint, "sha256_of", 3),  # after the sixth step
        "last save": (checkpoint, "sha256_of", 13),
    }[where]
    function, calls = getattr(holder, name), []

    def interrupted(*arguments, **named):
        calls.append(name)
        if len(calls) == call and int(os.environ.get("RANK", 0)) == rank:
            os.kill(os.getpid(), number)
        return function(*arguments, **named)

    monkeypatch.setattr(holder, name, interrupted)


@pytest.mark.parametrize(
    ("where", "size", "rank"),
    [
        ("training", 1, 0),
        pytest.param("evaluation", 1, 0, marks=pytest.mark.slow),
        pytest.param("training", 2, 0, marks=pytest.mark.slow),
        pytest.param("training", 2, 1, marks=pytest.mark.slow),
        pytest.param("save", 2, 0, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_is_saved_and_continues_exactly(monkeypatch, tmp_path, whole, where, size, rank):
    with monkeypatch.context() as patched:
        interrupt_within(patched, where, rank=rank)
        done = scripts_on_ranks(size, *said(tmp_path, "stopped"))
    assert [one.status for one in done] == [143] * size
    (message,) = filter(None, (one.err.strip() for one in done))
    assert message.startswith("terminated; step ")
    assert " is saved; continue with: " in message
    step = {"training": 10 + (size > 1), "evaluation": 16, "save": 7 + (size > 1)}[where]
    state = final_state(tmp_path / "stopped")
    assert state["epoch"] * 8 + state["step"] == step, "at once, or after the step in which all know of it"
    assert len(lines(tmp_path / "stopped" / "metrics.jsonl")) == state["epoch"]
    run_whole(size, tmp_path, "stopped", "--resume")
    assert_same_run(tmp_path / "stopped", whole(size))


def test_streamed_images_continue_where_the_run_stopped(monkeypatch, tmp_path, own_images):
    streamed = ("dataset=folder", f"dataroot={own_images}", "image_size=16", "resident_gb=0.00001", "valid_size=0")
    settings = (*DEMANDING, *streamed, "train_size=20", "batch_size=5")  # 4 steps in an epoch
    truth = run_whole(1, tmp_path, settings=settings)
    with monkeypatch.context() as patched:
        interrupt_within(patched, "training")
        (done,) = scripts_on_ranks(1, *said(tmp_path, "stopped", settings=settings))
    assert done.status == 143
    assert final_state(tmp_path / "stopped")["step"] == 2, "of the third epoch"
    run_whole(1, tmp_path, "stopped", "--resume", settings=settings)
    assert_same_run(tmp_path / "stopped", truth)


@pytest.mark.slow
def test_two_resumptions_in_a_row_from_within_epochs(monkeypatch, tmp_path, whole):
    for flags in ((), ("--resume",)):
        with monkeypatch.context() as patched:
            interrupt_within(patched, "training", signal.SIGINT)
            (done,) = scripts_on_ranks(1, *said(tmp_path, "stopped", *flags))
        assert done.status == 130
        assert done.err.strip().startswith("interrupted; step ")
    assert final_state(tmp_path / "stopped")["step"] == 4, "of the third epoch"
    run_whole(1, tmp_path, "stopped", "--resume")
    assert_same_run(tmp_path / "stopped", whole(1))


@pytest.mark.slow
def test_a_stop_request_during_the_last_save_is_too_late(monkeypatch, tmp_path, whole):
    with monkeypatch.context() as patched:
        interrupt_within(patched, "last save")
        (done,) = scripts_on_ranks(1, *said(tmp_path, "finished"))
    assert (done.status, done.err) == (0, "")
    assert "Finished 4 of 4 epochs" in done.out
    assert_same_run(tmp_path / "finished", whole(1))


def end_by_signals(*numbers):
    """The exit code of a process that is sent these signals while it handles stop requests, and then exits."""

    def run():
        with stopping.StopRequest():
            for number in numbers:
                os.kill(os.getpid(), number)
            os._exit(7)

    with Ranks(1, run) as ranks:
        ranks.processes[0].join(60)
        return ranks.processes[0].exitcode


def test_a_second_ctrl_c_ends_a_process_at_once(monkeypatch):
    interrupt, terminate = signal.SIGINT, signal.SIGTERM
    assert end_by_signals(interrupt, terminate, terminate) == 7
    assert end_by_signals(interrupt, interrupt) == -interrupt
    assert end_by_signals(terminate, interrupt, interrupt) == -interrupt
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "which sends on what the terminal has sent to all")
    assert end_by_signals(interrupt, interrupt) == 7
    assert end_by_signals(interrupt, interrupt, interrupt) == -interrupt


def test_a_reader_of_stderr_may_end_by_the_same_ctrl_c():
    """`2>&1 | tee`: the signal reaches both, and the request is recorded all the same."""

    def run():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 2)
        with stopping.StopRequest(lambda name: name) as request:
            os.kill(os.getpid(), signal.SIGINT)
            return request.signum

    (done,) = start_ranks(1, run)
    assert done.result == signal.SIGINT, done.err


def test_a_state_is_reported_as_saved_only_after_it_is(monkeypatch, tmp_path):
    """The process that is asked to stop is not the one that saves, and fails to."""
    interrupt_within(monkeypatch, "training", rank=1)
    save, calls = checkpoint.Checkpoints.save, []

    def out_of_room(self, state):
        calls.append(1)
        if len(calls) == 5:  # before it 0, 3, 6 and 8 steps were saved
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        return save(self, state)

    monkeypatch.setattr(checkpoint.Checkpoints, "save", out_of_room)
    done = scripts_on_ranks(2, *said(tmp_path, "full"))
    assert [one.status for one in done] == [2, 2]
    (message,) = filter(None, (one.err for one in done))
    assert "checkpoints: cannot be written to (File too large" in message


@pytest.mark.slow
@pytest.mark.parametrize("closed", [1, 2])
def test_a_run_without_stdout_or_stderr_goes_on(start_process, tmp_path, closed):
    """As with `>&-`: no file gets the number of the one that is closed, and nothing is written to it."""
    process = start_process(*said(tmp_path, "run", settings=TINY), preexec_fn=lambda: os.close(closed))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert ("epoch 3/3" in out) == (closed == 2)
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 3


def test_signals_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with contextlib.suppress(ZeroDivisionError), stopping.StopRequest() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise ZeroDivisionError
    assert request.signum == signal.SIGTERM, "the first counts"
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before


def test_forked_workers_ignore_the_stop_request_of_their_run():
    def run():
        with stopping.StopRequest(lambda name: f"{name} noted") as request:
            child = os.fork()
            if child == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                os._exit(5)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), request.signum

    (done,) = start_ranks(1, run)
    assert done.result == (5, 0)
    assert done.err == ""


# Whole processes, as users start and end them


def wait_for(path):
    """Until a file is there."""
    for _ in range(3000):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"{path} does not appear")


def wait_for_epoch(process):
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            return
    pytest.fail(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stopped_process_says_how_to_continue(start_process, tmp_path, script, number):
    settings = (*TINY, "epochs=500")
    process = start_process(*said(tmp_path, "stopped", settings=settings))
    wait_for_epoch(process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}[number]
    first, last = filter(None, err.splitlines())
    assert first.startswith(f"{number.name}: finishing this step and saving, about ")
    assert "Traceback" not in err
    before = final_state(tmp_path / "stopped")
    command = shlex.split(last.split("continue with: ")[1])
    assert command[:2] == ["python", str(ROOT / "main.py")]
    assert script("main.py", *command[2:], "--stop_epoch", before["epoch"] + 2).status == 0
    assert final_state(tmp_path / "stopped")["epoch"] == before["epoch"] + 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launched_run_that_is_stopped_continues_exactly(tmp_path, whole, number):
    """torchrun hands on what it gets; from a terminal Ctrl-C reaches all its processes as well."""
    arguments = said(tmp_path, "stopped")
    process = launch("torchrun", free_port(), tmp_path / "strict", *arguments)
    wait_for(tmp_path / "stopped" / "checkpoints")  # once all processes respond to signals
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.count(" is saved; continue with: the same command and --resume") == 1, err
    run_whole(2, tmp_path, "stopped", "--resume")
    assert_same_run(tmp_path / "stopped", whole(2))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_run_with_workers_can_be_stopped(start_process, tmp_path, own_images, number):
    settings = (*TINY, "dataset=folder", f"dataroot={own_images}", "image_size=16", "train_size=20", "epochs=2000")
    arguments = said(tmp_path, "stopped", settings=(*settings, "workers=2", "resident_gb=0.00001"))
    process = start_process(*arguments, start_new_session=True)
    wait_for_epoch(process)
    os.killpg(process.pid, number)  # as terminals and batch systems do
    _, err = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}[number]
    assert "Traceback" not in err
    assert err.count(f"{number.name}: ") == err.count(" saved; continue with: ") == 1
    assert final_state(tmp_path / "stopped")["epoch"] >= 1


# Another number of processes


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_other_processes_continue_from_the_epochs_start(monkeypatch, tmp_path, before, after):
    """Without noise in the network the only difference is in whose statistics of BatchNorm are averaged when."""
    settings = (*DEMANDING, "accumulate=2", "dropout=0", "policy=random")
    settings += ("ops=[Rotate,Invert,Solarize]",)  # not SamplePairing, whose partners are of the same process
    truth = run_whole(after, tmp_path, settings=settings)
    with monkeypatch.context() as patched:
        interrupt_within(patched, "training")
        done = scripts_on_ranks(before, *said(tmp_path, "moved", settings=settings))
    assert {one.status for one in done} == {143}
    state = final_state(tmp_path / "moved")
    assert state["step"] > 0
    refused = scripts_on_ranks(after, *said(tmp_path, "moved", "--resume", settings=settings))
    assert [one.status for one in refused] == [2] * after
    assert "--resume-elastic" in "".join(one.err for one in refused)
    assert same(final_state(tmp_path / "moved"), state)
    done = scripts_on_ranks(after, *said(tmp_path, "moved", "--resume-elastic", settings=settings))
    assert [one.status for one in done] == [0] * after
    words = f"continues from the start of epoch {state['epoch'] + 1} with another number of"
    assert sum(one.err.count(words) for one in done) == 1
    ours, theirs = (lines(run / "metrics.jsonl") for run in (tmp_path / "moved", truth))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [8, 16, 24, 32]
    assert [line["train_loss"] for line in ours] == pytest.approx([line["train_loss"] for line in theirs], rel=0.02)
    ours, theirs = (lines(run / "policies.jsonl") for run in (tmp_path / "moved", truth))
    assert [line["policies"] for line in ours] == [line["policies"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], rel=0.05)


# A full disk


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("full", ["checkpoints", pytest.param("everything", marks=pytest.mark.slow)])
def test_a_full_disk_keeps_the_last_checkpoint(monkeypatch, tmp_path, whole, full, size):
    """From the third checkpoint on, no file may grow beyond a tenth of one; or none beyond what it holds now."""
    save, calls = checkpoint.Checkpoints.save, []

    def out_of_room(self, state):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if full == "checkpoints" else 100,) * 2)
        return save(self, state)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", out_of_room)
        done = scripts_on_ranks(size, *said(tmp_path, "full"))
    run = tmp_path / "full"
    assert [one.status for one in done] == [2] * size
    (message,) = filter(None, (one.err for one in done))
    assert len(message.splitlines()) <= 2
    assert f"{run / 'checkpoints'}: cannot be written to (File too large, " in message
    assert " MB are needed, " in message
    assert "make room" in message
    assert final_state(run)["step"] == 3
    assert not list((run / "checkpoints").glob("*.part"))
    run_whole(size, tmp_path, "full", "--resume")
    assert_same_run(run, whole(size))


@pytest.mark.slow
def test_a_log_that_cannot_be_written_ends_the_run(monkeypatch, tmp_path, whole):
    end_epoch = trainingstate.TrainingState.end_epoch

    def out_of_room(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        end_epoch(self)

    with monkeypatch.context() as patched:
        patched.setattr(trainingstate.TrainingState, "end_epoch", out_of_room)
        (done,) = scripts_on_ranks(1, *said(tmp_path, "full"))
    assert_refused(done, f"{tmp_path / 'full'}: cannot be written to (File too large", "make room")
    run_whole(1, tmp_path, "full", "--resume")
    assert_same_run(tmp_path / "full", whole(1))


def test_a_picture_that_cannot_be_written_is_no_traceback(tmp_path):
    """A thread of TensorBoard's writes it."""

    def run():
        log = RunLog(tmp_path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            log.policy_images(torch.zeros(1, 1, 3, 96, 96, dtype=torch.uint8), ["x" * 1000], 1)
            log.positions()
        except UserError as error:
            return str(error)
        finally:
            log.close()

    (done,) = start_ranks(1, run)
    assert done.result.startswith(f"{tmp_path}: cannot be written to (File too large")
    assert done.err == ""


def test_room_for_a_checkpoint_is_checked_before_training(monkeypatch, tmp_path):
    write, steps = main.write_run_directory, []

    def out_of_room(*arguments, **named):
        write(*arguments, **named)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    with monkeypatch.context() as patched:
        patched.setattr(main, "write_run_directory", out_of_room)
        patched.setattr(main, "learn", lambda *_: steps.append(1))
        (done,) = scripts_on_ranks(1, *said(tmp_path, "full"))
    assert_refused(done, "cannot be written to", "make room")
    assert lines(tmp_path / "full" / "metrics.jsonl") == []
