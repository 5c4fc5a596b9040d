"""Shared by all tests: fixtures that run scripts and processes, tiny runs, and the choice of quick tests."""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import settings
from PIL import Image
from torch import nn

import evaluate
import experiments
import main
import report
import training.exit as exits
from datasets import loading
from training.checkpoint import Checkpoints
from training.distributed import World, join
from training.exit import exit_with_status

# The same examples every time, and no limit on how long one takes.
settings.register_profile("project", deadline=None, derandomize=True, database=None)
settings.load_profile("project")
# Threads that spin while they wait make small steps many times slower on a busy machine.
torch.set_num_threads(1)
exits.leave = sys.exit  # here and in forked processes; scripts that are started as programs are not affected
loading.draw_shapes = functools.cache(loading.draw_shapes)  # always the same, and needed by every run

ROOT = Path(__file__).parent.parent
DRAW_PLOTS = evaluate.draw_plots
ALONE = World((torch.device("cpu"),))
# The smallest run that still has several steps, policies and epochs, with what the demo leaves out.
TINY = ("model=wresnet10_1", "train_size=40", "batch_size=10", "M=2", "epochs=3", "eval_every=3", "workers=0")
TINY += ("image_size=8", "crop_padding=2", "cutout=4", "optimizer=sgd", "lr=0.1", "entropy_floor=0")

# With main.build_model replaced by little_network, a run that is smaller still: 4 steps an epoch, scored on 10 images.
LITTLE = ("valid_size=10", "dropout=0.1")

# A shell ignores SIGINT in its background jobs and their children; the tests need the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Finished(NamedTuple):
    status: int
    out: str
    err: str


def pytest_addoption(parser):
    parser.addoption("--device", help="where the tests marked cuda run (default: cuda, or skipped without a GPU)")


# What -m quick runs: files, without their slow tests and those of SLOWER.
QUICK = ("test_augmentations", "test_controller", "test_config", "test_layout", "test_run")
SLOWER = ("takes_over", "every_choice_possible")


def pytest_collection_modifyitems(items):
    for item in items:
        slow = item.get_closest_marker("slow") or any(name in item.name for name in SLOWER)
        if item.path.stem in QUICK and not slow:
            item.add_marker("quick")


@pytest.fixture(scope="session")
def device(request):
    """The device of a test marked cuda."""
    name = request.config.getoption("--device")
    if name is None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(name or "cuda")


@contextlib.contextmanager
def no_waits(device):
    """On a GPU, waiting for it raises RuntimeError; the CPU has nothing to wait for."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    """Plots take half a second each: only tests that ask for `with_axes` draw them."""
    monkeypatch.setattr(evaluate, "draw_plots", lambda *_: None)


@pytest.fixture
def with_axes(monkeypatch, no_figures):
    monkeypatch.setattr(evaluate, "draw_plots", DRAW_PLOTS)


@pytest.fixture
def script(monkeypatch):
    """Run a script in this process, from the project's root: script("main.py", "--M", 2) -> Finished."""
    monkeypatch.chdir(ROOT)

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        entry = {
            "main.py": main.main,
            "evaluate.py": evaluate.main,
            "experiments.py": experiments.main,
            "report.py": report.main,
        }[name]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as leaving:
            exit_with_status(entry)
        return Finished(leaving.value.code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def train(script, tmp_path):
    """A tiny training run: train("name", "lr=0.2", "--resume") -> its directory."""

    def run(name, *arguments):
        overrides = [word for word in arguments if not str(word).startswith("-")]
        flags = [word for word in arguments if str(word).startswith("-")]
        done = script("main.py", "--logdir", tmp_path, "--name", name, *flags, "--set", *TINY, *overrides)
        assert done.status == 0, done.err
        return tmp_path / name

    return run


class OfRank(NamedTuple):
    status: int
    result: object  # what the function returned, or None
    out: str
    err: str


def on_ranks(size, function, *arguments):
    """function(world, *arguments) in `size` processes of a group, without a launcher -> [OfRank] by rank."""
    return start_ranks(size, lambda: _call_joined(function, arguments))


def scripts_on_ranks(size, name, *arguments):
    """A script in `size` processes, as if torchrun had started it -> [OfRank] by rank."""
    return start_ranks(size, as_script(name, *arguments))


def as_script(name, *arguments):
    """A function that runs a script, for a process to call."""

    def run():
        sys.argv = [name, *map(str, arguments)]
        exit_with_status({"main.py": main.main, "evaluate.py": evaluate.main}[name])

    return run


def _call_joined(function, arguments):
    with join("cpu") as world:
        return function(world, *arguments)


def start_ranks(size, run):
    with Ranks(size, run) as ranks:
        return ranks.finished()


class Ranks:
    """`size` processes that call run() as if torchrun had started them; killed at the end of the context."""

    def __init__(self, size, run):
        forking = multiprocessing.get_context("fork")  # the modules are loaded already
        ports, port = forking.Pipe(duplex=False)
        self._store = forking.Process(target=_run_store, args=(port,), daemon=True)
        _start(self._store)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_receive(ports)), "WORLD_SIZE": str(size)}
        # As under torchrun, another process runs the store, which outlives the processes of the group.
        meeting |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        self._results = [forking.Pipe(duplex=False) for _ in range(size)]
        self.processes = [
            forking.Process(target=self._as_rank, args=(rank, run, meeting if size > 1 else {})) for rank in range(size)
        ]
        for process in self.processes:
            _start(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in (*self.processes, self._store):
            process.kill()
            process.join()

    def finished(self):
        """[OfRank] by rank, once all have ended."""
        return [pickle.loads(_receive(result, raw=True)) for result, _ in self._results]

    def _as_rank(self, rank, run, meeting):
        os.chdir(ROOT)
        os.environ |= meeting | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if meeting else {})
        out, err, result, status = io.StringIO(), io.StringIO(), None, 1
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result, status = run(), 0
            except SystemExit as leaving:
                status = leaving.code
            except BaseException:
                traceback.print_exc()
        self._results[rank][1].send_bytes(pickle.dumps(OfRank(status, result, out.getvalue(), err.getvalue())))
        os._exit(0)  # skips the exit handlers of pytest


def _run_store(port):
    """In another process: forking from one with the store's threads could copy a lock that they hold."""
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
def own_images(tmp_path):
    """A folder data set of two classes with ten images each, for training and for testing."""
    g = torch.Generator().manual_seed(0)
    for split, name, i in itertools.product(("train", "test"), ("cats", "dogs"), range(10)):
        path = tmp_path / "data" / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (16, 16, 3), dtype=torch.uint8, generator=g).numpy()).save(path)
    return tmp_path / "data"


@pytest.fixture
def start_process():
    """Start a script in another process, as a user would; killed at the end of the test."""
    processes = []

    def start(name, *arguments, **options):
        command = [sys.executable, str(ROOT / name), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, **pipes, **options)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def assert_refused(done, *words):
    """Exit status 2 and one or two lines with these words, without a traceback."""
    assert done.status == 2, (done.out, done.err)
    assert "Traceback" not in done.err
    assert 1 <= len(done.err.strip().splitlines()) <= 2, done.err
    assert all(word in done.err for word in words), done.err


LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    "launch": [sys.executable, "-m", "torch.distributed.launch"],
}
# A sitecustomize.py: warnings of deprecation are errors in the processes that the launcher starts.
STRICT = """import os, warnings
if "RANK" in os.environ:
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.simplefilter("error", category)
"""


def launch(launcher, port, folder, *arguments, size=2):
    """Start a script by torchrun or torch.distributed.launch, in a process group that can be killed."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(STRICT)
    command = [*LAUNCHERS[launcher], "--nproc_per_node", str(size), "--master_port", str(port), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lines(path):
    """The records of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def files(run, *names):
    return [(run / name).read_bytes() for name in names or ("metrics.jsonl", "policies.jsonl")]


def little_network(_name, classes, dropout=0.0, **_):
    """Small enough for many complete runs, with BatchNorm and dropout as in larger networks."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten()),
        nn.Dropout(dropout),
        nn.Linear(256, classes),
    )


class Unkept:
    """Replaces the RunManager of an epoch; only collects the records of its intervals."""

    def __init__(self):
        self.intervals = []

    def after_step(self):
        pass

    def after_interval(self, record):
        self.intervals.append(record)


def final_state(run):
    """The newest checkpoint of a run, without its times."""
    state = Checkpoints(run / "checkpoints").load_newest(pytest.fail)
    del state["positions"]["times.jsonl"]
    del state["epoch_totals"]["seconds"]
    return state


def same(a, b):
    """Whether two nested states are equal in every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
