"""Shared by all tests: examples drawn by hypothesis are the same every time, and none of them races a clock."""

import contextlib
import functools
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings

import dataloader
import evaluate
import main
import pictures
import robustness
from processes import World, exit_with_status, join

settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")
# Threads that wait for each other by spinning make small steps many times slower on a machine with other work.
torch.set_num_threads(1)
dataloader.draw_shapes = functools.cache(dataloader.draw_shapes)  # always the same, and wanted by every run

ROOT = Path(__file__).parent.parent
FIGURE_CLASS = pictures.figure_class
ALONE = World((torch.device("cpu"),))
# The smallest run that still has several steps, policies and epochs.
TINY = ("model=wresnet10_1", "train_size=40", "batch_size=10", "M=2", "epochs=3", "eval_every=3", "workers=0")


# A process started in the background of a shell inherits that SIGINT is ignored; a user's in the foreground does not.
HEEDING_SIGINT = """import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")"""


class Finished(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch):
    """Figures with axes take half a second each: only tests that ask for `with_axes` draw them."""
    monkeypatch.setattr(pictures, "figure_class", lambda: None)


@pytest.fixture
def with_axes(monkeypatch):
    monkeypatch.setattr(pictures, "figure_class", FIGURE_CLASS)


@pytest.fixture
def script(monkeypatch):
    """Run a script in this process, from the project's root: script("main.py", "--M", 2) -> Finished."""
    monkeypatch.chdir(ROOT)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        entry = {"main.py": main.main, "evaluate.py": evaluate.main, "robustness.py": robustness.main}[name]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leaving:
            exit_with_status(entry)
        return Finished(leaving.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def train(script, tmp_path):
    """A tiny training run: train("name", "lr=0.2", "--resume") -> its directory; fails if the run fails."""

    def run(name, *arguments):
        settings_said = [word for word in arguments if not str(word).startswith("-")]
        flags = [word for word in arguments if str(word).startswith("-")]
        done = script("main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *settings_said)
        assert done.status == 0, done.err
        return tmp_path / name

    return run


class OfRank(NamedTuple):
    status: int
    result: object  # what the function returned, or None
    out: str
    err: str


def on_ranks(size, function, *arguments):
    """function(world, *arguments) in `size` processes that have joined -> [OfRank] by rank; no launcher is needed."""
    return start_ranks(size, lambda: _call_joined(function, arguments))


def scripts_on_ranks(size, name, *arguments):
    """A script in `size` processes, as if torchrun had started it -> [OfRank] by rank."""

    def run():
        sys.argv = [name, *map(str, arguments)]
        exit_with_status({"main.py": main.main, "evaluate.py": evaluate.main}[name])

    return start_ranks(size, run)


def _call_joined(function, arguments):
    with join("cpu") as world:
        return function(world, *arguments)


def start_ranks(size, run):
    forking = multiprocessing.get_context("fork")  # the modules are loaded already
    ports, port = forking.Pipe(duplex=False)
    keeper = forking.Process(target=_keep_store, args=(port,), daemon=True)
    _start(keeper)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_receive(ports)), "WORLD_SIZE": str(size)}
    # As under torchrun: the store is kept by another process, and outlives those that meet there.
    meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    results = [forking.Pipe(duplex=False) for _ in range(size)]

    def as_rank(rank):
        os.chdir(ROOT)
        os.environ |= meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        out, err, result, status = io.StringIO(), io.StringIO(), None, 1
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result, status = run(), 0
            except SystemExit as leaving:
                status = leaving.code
            except BaseException:
                traceback.print_exc()
        results[rank][1].send_bytes(pickle.dumps(OfRank(status, result, out.getvalue(), err.getvalue())))
        os._exit(0)  # without the test runner's own farewell

    ranks = [forking.Process(target=as_rank, args=(rank,)) for rank in range(size)]
    for rank in ranks:
        _start(rank)
    try:
        return [pickle.loads(_receive(result, raw=True)) for result, _ in results]
    finally:
        for process in (*ranks, keeper):
            process.kill()
            process.join()


def _keep_store(port):
    """In a process of its own: forking from one that has the store's threads could copy a lock that they hold."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port.send(store.port)
    signal.pause()


def _start(process):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process that has threads
        process.start()


def _receive(connection, *, raw=False):
    assert connection.poll(300), "a process does not answer"
    return connection.recv_bytes() if raw else connection.recv()


@pytest.fixture
def start_process():
    """Start a script in a process of its own, as a user would; ended with the test."""
    processes = []

    def start(name, *arguments):
        command = [sys.executable, "-c", HEEDING_SIGINT, str(ROOT / name), *map(str, arguments)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def assert_refused(done, *words):
    """Exit status 2 and one or two lines without a traceback, holding `words`."""
    assert done.status == 2, (done.out, done.err)
    assert "Traceback" not in done.err
    assert 1 <= len(done.err.strip().splitlines()) <= 2, done.err
    assert all(word in done.err for word in words), done.err


def same(a, b):
    """Whether two nested states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
