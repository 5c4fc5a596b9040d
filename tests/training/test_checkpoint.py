"""Checkpoints: damage is detected, a failed save changes nothing, and no content is trusted."""

import contextlib
import fcntl
import hashlib
import io
import math
import os
import random
import re
import resource
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ALONE, LITTLE, TINY, as_script, assert_refused, final_state, little_network, same, start_ranks
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import main
from config import load_config
from datasets.download import Downloads
from training.checkpoint import Checkpoints
from training.manager import RunManager
from training.state import TrainingState
from utils import UserError, load_tensors, save_tensors, write_text


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)


def contents(folder):
    """The content of each file of a folder, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def hash_of(content):
    return hashlib.sha256(content).hexdigest()[:16]


def small_state(epoch, step, size=10, number=0):
    """A small state with the parts of a checkpoint; `number` tells it from others of the same position."""
    state = {key: {} for key in ("epoch_totals", "optimizer", "scaler", "policies", "positions")}
    state |= {"epoch": epoch, "step": step, "rewinds": number, "data": "", "ranks": [{"devices": 1}]}
    return state | {"model": {"weight": torch.full((size,), epoch + step / 100)}}


def put(folder, content, epoch=2):
    """A file whose name holds the right hash of any content."""
    folder.mkdir(exist_ok=True)
    file = folder / f"epoch-{epoch:04d}-step-000000-{hash_of(content)}.pt"
    file.write_bytes(content)
    return file


def in_child(function, *arguments):
    """The function's result in its own process, whose limits and rights it may change."""
    (done,) = start_ranks(1, lambda: function(*arguments))
    assert done.status == 0, done.err
    return done.result


def refusal(function, *words):
    """The message of a UserError: one or two lines that hold `words`."""
    with pytest.raises(UserError) as refused:
        function()
    message = str(refused.value)
    assert 1 <= len(message.splitlines()) <= 2, message
    assert all(word in message for word in words), message
    return message


def load(folder):
    return Checkpoints(folder).load_newest(pytest.fail)


# Damage


def test_every_damage_is_detected_named_and_skipped(train):
    """By the hash in the file's name: 200 changed bytes, one at a time, and 50 lengths."""
    folder = train("run", *LITTLE, "policy=random", "--stop_epoch=2") / "checkpoints"
    older, newer = sorted(folder.iterdir())
    expected, intact, rng = load_tensors(older), newer.read_bytes(), random.Random(1)
    assert same(load(folder), load_tensors(newer))
    for file, epoch in ((older, 1), (newer, 2)):
        assert file.name == f"epoch-000{epoch}-step-000000-{hash_of(file.read_bytes())}.pt"
    damaged = [intact[: round(i * (len(intact) - 1) / 49)] for i in range(50)]
    for position in (0, len(intact) - 1, intact.rindex(b"PK"), *(rng.randrange(len(intact)) for _ in range(197))):
        damaged.append(intact[:position] + bytes([intact[position] ^ rng.randrange(1, 256)]) + intact[position + 1 :])
    for content in damaged:
        newer.write_bytes(content)
        before, warnings = contents(folder), []
        assert same(Checkpoints(folder).load_newest(warnings.append), expected)
        (warning,) = warnings
        assert f"{newer}: is damaged" in warning
        assert contents(folder) == before, "nothing is deleted or repaired"


def test_damaged_files_are_named_newest_first(tmp_path):
    """Those older than the one that is used are not mentioned. If all are damaged, the folder is refused."""
    checkpoints = Checkpoints(tmp_path)
    files = [checkpoints.save(small_state(epoch, step)) for epoch, step in ((1, 0), (2, 0), (2, 2), (2, 4))][-3:]
    oldest = put(tmp_path, b"damaged later", epoch=1)
    for file in (oldest, *files[1:]):
        file.write_bytes(file.read_bytes() + b"\0")
    warnings = []
    assert Checkpoints(tmp_path).load_newest(warnings.append)["step"] == 0
    assert [warning.split(":")[0] for warning in warnings] == [str(files[2]), str(files[1])]
    files[0].write_bytes(b"")
    before = contents(tmp_path)
    refusal(lambda: load(tmp_path), str(tmp_path), "none of the 4 checkpoints is intact", "--overwrite")
    assert contents(tmp_path) == before


def test_between_epochs_only_files_without_steps_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    boundary = checkpoints.save(small_state(9_999, 0))
    for age, step in enumerate((1, 2, 1_000_000)):
        os.utime(checkpoints.save(small_state(10_000, step)), (10**9 - age, 10**9 - age))
    assert load(tmp_path)["step"] == 1_000_000, "whatever the times of the files"
    assert Checkpoints(tmp_path).load_newest(pytest.fail, between_epochs=True)["step"] == 0
    boundary.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints of the end of an epoch is intact"):
        Checkpoints(tmp_path).load_newest(pytest.fail, between_epochs=True)


# What is kept


def is_intact(file):
    return file.name.endswith(f"-{hash_of(file.read_bytes())}.pt")


def position_of(file):
    return tuple(map(int, file.name.split("-")[1:4:2]))


SAVES = st.tuples(st.just("save"), st.integers(0, 3))  # steps in the epoch before the save; 0 begins a new epoch
EVENTS = st.one_of(SAVES, SAVES, SAVES, st.tuples(st.sampled_from(["damage", "resume", "kill"]), st.integers(0, 9)))


@settings(max_examples=60)
@given(st.lists(EVENTS, min_size=10, max_size=40))
def test_the_newest_two_and_the_newest_epoch_end_are_kept(events):
    """A run that is stopped, killed while it saves, resumed, and whose files are damaged, in any order.

    Damaged and unknown files never change.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "notes.txt").write_text("mine")
        checkpoints, epoch, step = Checkpoints(folder), 0, 0
        for count, (event, number) in enumerate(events):
            if event == "save":
                epoch, step = (epoch, step + number) if number else (epoch + 1, 0)
                before = contents(folder)
                damaged = {file.name for file in folder.glob("epoch*") if not is_intact(file)}
                new = checkpoints.save(small_state(epoch, step, number=count))
                assert is_intact(new)
                assert position_of(new) == (epoch, step)
                intact = sorted((before.keys() - damaged - {"notes.txt", "new.part"}) | {new.name})
                boundaries = [name for name in intact if "step-000000" in name]
                kept = {*intact[-2:], *boundaries[-1:]}
                assert contents(folder).keys() == kept | damaged | {"notes.txt"}
                assert (before | contents(folder)).items() == (contents(folder) | before).items(), "none has changed"
                continue
            if event == "damage" and (files := sorted(folder.glob("epoch*"))):
                file = files[number % len(files)]
                file.write_bytes(file.read_bytes()[:-1] if file.stat().st_size else b"x")
            if event == "kill":
                (folder / "new.part").write_bytes(b"half" * number)
            intact = [position_of(file) for file in folder.glob("epoch*") if is_intact(file)]
            checkpoints = Checkpoints(folder)
            try:
                state = checkpoints.load_newest(lambda _: None)
            except UserError:
                assert not intact
                return
            epoch, step = (state["epoch"], state["step"]) if state else (0, 0)
            assert (epoch, step) == max(intact, default=(0, 0))


def test_other_files_and_folders_do_not_change(tmp_path):
    assert load(tmp_path / "missing") is None
    names = ("epoch-0099-step-000000-0123456789ABCDEF.pt", "old epoch-0099-step-000000-0123456789abcdef.pt", "model.pt")
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "epoch-0098-step-000000-0123456789abcdef.pt").mkdir()
    (tmp_path / "epoch-0097-step-000000-0123456789abcdef.pt").symlink_to("missing")
    others = set(tmp_path.iterdir())
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_newest(pytest.fail) is None
    for position in ((0, 0), (0, 1), (0, 2), (1, 0)):
        checkpoints.save(small_state(*position))
    assert others < set(tmp_path.iterdir())
    assert all((tmp_path / name).read_bytes() == b"mine" for name in names)


# Written completely or not at all


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure may leave a name without content. Not every file system can flush the folder.

    Windows flushes no file that is open for reading only.
    """
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    writers = (
        lambda: Checkpoints(tmp_path).save(small_state(1, 0)),
        lambda: write_text(tmp_path / "file", "text"),
        lambda: save_tensors(tmp_path / "file", {"x": torch.ones(3)}),
    )
    for write in writers:
        calls.clear()
        file = (write() or tmp_path / "file").stat()
        assert [name for name, *_ in calls] == ["fsync", "replace", "fsync"]
        assert calls[0][1:] == calls[1][1:] == (file.st_ino, file.st_size), "all bytes, before the rename"
        assert calls[2][1] == tmp_path.stat().st_ino


def limit_file_size(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("share", [0.0, 0.97])
def test_a_save_that_does_not_fit_keeps_the_previous_one(tmp_path, share):
    folder = tmp_path / "checkpoints"
    state = small_state(1, 0, size=250_000)
    Checkpoints(folder).save(state)
    before = contents(folder)

    def save():
        checkpoints = Checkpoints(folder)
        checkpoints.load_newest(pytest.fail)
        limit_file_size(round(share * len(*before.values())))
        return refusal(lambda: checkpoints.save(small_state(2, 0, size=250_000)), str(folder))

    message = in_child(save)
    assert "cannot be written to (File too large, 1.0 MB are needed, " in message
    free = float(re.search(r"([\d,.]+) MB are free", message)[1].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(folder).free / 1e6, rel=0.5)
    assert contents(folder) == before, "without new.part"
    assert same(load(folder), state)


def test_a_run_on_a_full_disk_stops_and_resumes_exactly(train, tmp_path):
    reference = train("reference", *LITTLE)
    run = train("full", *LITTLE, "--stop_epoch=1")
    before = contents(run / "checkpoints")

    def resume_without_room():
        limit_file_size(max(map(len, before.values())) - 1000)
        as_script("main.py", "--resume", "--logdir", tmp_path, "--name", "full", "--set", *TINY, *LITTLE)()

    (done,) = start_ranks(1, resume_without_room)
    assert_refused(done, "checkpoints: cannot be written to", "MB are needed", "MB are free")
    assert contents(run / "checkpoints") == before
    train("full", *LITTLE, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert same(final_state(run), final_state(reference))


def test_a_read_only_folder_is_named_and_not_changed(tmp_path):
    folder = tmp_path / "checkpoints"
    file = Checkpoints(folder).save(small_state(1, 0))
    before = contents(folder)

    def save():
        os.chdir(tmp_path)  # the folders above may be closed to other users
        if os.geteuid() == 0:  # may write anywhere
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return refusal(lambda: Checkpoints(Path(folder.name)).save(small_state(2, 0)))

    for path, mode in ((tmp_path, 0o755), (file, 0o644), (folder, 0o555)):
        path.chmod(mode)
    try:
        message = in_child(save)
    finally:
        folder.chmod(0o755)
    assert "checkpoints: cannot be written to (Permission denied" in message
    assert "fix its permissions" in message
    assert contents(folder) == before


@pytest.mark.parametrize("place", ["file", "link", "above/checkpoints"])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "above").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    refusal(lambda: Checkpoints(tmp_path / place).save(small_state(1, 0)), str(tmp_path / place), "cannot be created")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("place", ["write", "flush", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_at_any_moment_keeps_the_previous_one(tmp_path, monkeypatch, place, error):
    def fail(*_):
        raise error

    def write_half(state, file):
        file.write(b"half a checkpoint")
        file.flush()
        raise error

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small_state(1, 0))
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        if place == "write":
            patched.setattr(torch, "save", write_half)
        else:
            patched.setattr(os, {"flush": "fsync", "rename": "replace"}[place], fail)
        if isinstance(error, OSError):
            words = (str(tmp_path), error.strerror, "MB are needed", "MB are free", "earlier files are unharmed")
            refusal(lambda: checkpoints.save(small_state(2, 0)), *words)
        else:
            with pytest.raises(type(error)):
                checkpoints.save(small_state(2, 0))
    assert contents(tmp_path) == before
    checkpoints.save(small_state(2, 0))
    assert len(contents(tmp_path)) == 2, "the next save succeeds"


# Untrusted content under a name with the right hash


class Touches:
    """Creates a file when it is unpickled without restrictions."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    trace = tmp_path / "trace"
    file = put(tmp_path / "checkpoints", saved(small_state(2, 0) | {"model": Touches(trace)}))
    torch.load(file, weights_only=False)
    trace.unlink()  # it would be executed
    refusal(lambda: load(file.parent), str(file), "cannot be read as a checkpoint")
    assert not trace.exists()


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
NESTED = st.recursive(PLAIN, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=5), of))


@settings(max_examples=100)
@given(st.binary(max_size=300) | NESTED.map(saved) | st.binary(max_size=100).map(lambda tail: b"PK\x03\x04" + tail))
def test_any_other_content_is_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        file = put(Path(folder), content)
        refusal(lambda: load(file.parent), str(file))
        assert contents(file.parent) == {file.name: content}


def paths_in(value, at=()):
    """The path of every value in a nested state."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from paths_in(item, (*at, key))


REMOVED = object()


def changed(value, path, new):
    """A copy of a nested state with another value at `path`."""
    if not path:
        return new
    key, *rest = path
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    if rest or new is not REMOVED:
        items[key] = changed(items[key], rest, new)
    else:
        del items[key]
    return items if isinstance(value, dict) else list(items.values())


# Other types, other shapes, impossible numbers.
VALUES = (None, True, 0, -1, 3, 2**40, 2**70, 1.5, math.nan, math.inf, "", "x", b"x", [], {}, (1,), [[]], {"x": 1})
TENSORS = ((1,), (math.nan,), (0, 0), (0.5, 2), (99, 2, 5, 2), (-7, 2, 5, 2), (0, 5056))
SPECIAL = (torch.ones(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.complex64))
WRONG = (REMOVED, *VALUES, *(torch.full(shape, value) for value, *shape in TENSORS), *SPECIAL)


class Resumption:
    """Resumes a run, as main.py does, from changed versions of its checkpoint."""

    def __init__(self, run):
        self.run, self.config = run, load_config(run / "config.yaml", {})
        self.template = load(run / "checkpoints")
        self.logs = {path: path.read_bytes() for path in run.glob("*.jsonl")}

    def load(self, content):
        """A manager with the state of a checkpoint of this content; may raise UserError."""
        shutil.rmtree(self.run / "checkpoints")
        put(self.run / "checkpoints", content)
        state = TrainingState.start(self.config, ALONE, little_network("", 10))
        manager = RunManager(self.run, state, 4, self.template["data"])
        manager.load()
        return manager

    def train(self, content):
        """Load, and train for an epoch."""
        data = main.load_data(self.config, torch.device("cpu"), Downloads(None, False, quiet=True))
        with self.load(content) as manager:
            main.run_epoch(manager.state, data, manager)


@pytest.fixture(params=["random", "controller"])
def resumption(train, request):
    overrides = (f"policy={request.param}", "policy_interval=3", "grad_clip=5")
    return Resumption(train("trusted", *LITTLE, *overrides, "--stop_epoch=2"))


@pytest.mark.parametrize("resumption", ["controller"], indirect=True)
def test_incomplete_or_impossible_states_change_no_log(resumption):
    changes = [((key,), REMOVED) for key in resumption.template]
    changes += [
        (("ranks",), []),
        (("ranks",), None),
        (("ranks", 0, "devices"), torch.zeros(3)),
        (("ranks", 0, "skipped"), 2**70),
        (("epoch",), "2"),
        (("positions",), {}),
        (("positions", "times.jsonl"), REMOVED),
        (("positions", "metrics.jsonl"), -1),
    ]
    for path, value in changes:
        content = saved(changed(resumption.template, path, value))
        refusal(lambda: resumption.train(content), str(resumption.run))  # noqa: B023 (called at once)
        assert list(contents(resumption.run / "checkpoints").values()) == [content]
        assert {path: path.read_bytes() for path in resumption.logs} == resumption.logs, path
    resumption.train(saved(resumption.template))


# Examples do not depend on each other; shrinking would take minutes.
@settings(max_examples=100, phases=[Phase.generate], suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, len(WRONG) - 1)), min_size=1, max_size=3))
def test_a_randomly_changed_state_is_loaded_or_refused(resumption, changes):
    state, places = resumption.template, list(paths_in(resumption.template))
    for place, number in changes:
        with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):  # removed by another change
            state = changed(state, places[place % len(places)], WRONG[number])
    try:
        resumption.load(saved(state))
    except UserError as error:
        message = str(error)
        assert 1 <= len(message.splitlines()) <= 2, message
