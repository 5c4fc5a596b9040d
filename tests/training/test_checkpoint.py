"""Files that carry a run on: damage is noticed, a save that fails costs nothing, and no content is trusted."""

import contextlib
import hashlib
import io
import itertools
import math
import os
import pickle
import random
import re
import resource
import shutil
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
from utils import UserError, load_tensors, save_tensors, write_atomically, write_text

STEPS = 4  # of an epoch of the smallest run


@pytest.fixture(autouse=True)
def little(monkeypatch):
    monkeypatch.setattr(main, "build_model", little_network)


@pytest.fixture
def run(train):
    """A run of two epochs out of three, with two checkpoints."""
    return train("run", *LITTLE, "policy=random", "--stop_epoch=2")


def contents(folder):
    """What the files of a folder hold, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def hash_of(content):
    return hashlib.sha256(content).hexdigest()[:16]


def a_state(epoch, step, size=10, number=0):
    """A small state that counts as one of a run, and is told from others by its numbers."""
    none, numbers = torch.zeros(0), {"random": {"cpu": torch.zeros(0), "cuda": []}, "buffers": {}}
    numbers |= {
        "loss_sum_M": none,
        "teacher_sum_M": none,
        "teacher_buffers": {},
        "loss_and_correct": none,
        "devices": 1,
        "images": 0,
        "copies": 0,
        "skipped": 0,
    }
    return {
        "epoch": epoch,
        "step": step,
        "best": 0.0,
        "collapse": [0, -1],
        "rewinds": number,
        "epoch_totals": {"adversary": {}, "seconds": {"training": 0.0, "other": 0.0}},
        "model": {"weight": torch.full((size,), epoch + step / 100)},
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "policies": {"op_MQK": none, "level_MQK": none},
        "positions": {},
        "data": "",
        "ranks": [numbers],
    }


def put(folder, content, epoch=2, step=0):
    """A file whose name holds the right hash, whatever its content is."""
    folder.mkdir(exist_ok=True)
    file = folder / f"epoch-{epoch:04d}-step-{step:06d}-{hash_of(content)}.pt"
    file.write_bytes(content)
    return file


def in_one_child(function, *arguments):
    """The function's result in a process of its own, whose limits and rights may be changed."""
    (done,) = start_ranks(1, lambda: function(*arguments))
    assert done.status == 0, done.err
    return done.result


def assert_in_words(error, *words):
    assert 1 <= len(str(error).splitlines()) <= 2, str(error)
    assert all(word in str(error) for word in words), str(error)


# Damage


def sampled_positions(content, count):
    """The first and the last byte, all headers of the zip file and what follows them, and others by chance."""
    headers = [match.start() for match in re.finditer(rb"PK(\x01\x02|\x03\x04|\x05\x06|\x06\x06|\x06\x07)", content)]
    near = {header + i for header in headers[:: max(1, len(headers) // 25)] for i in (0, 4, 14, 26)}
    chosen = {0, len(content) - 1, headers[-1], headers[-1] + 16, *(p for p in near if p < len(content))}
    rng = random.Random(0)
    while len(chosen) < count:
        chosen.add(rng.randrange(len(content)))
    return sorted(chosen)


def test_every_damage_is_noticed_named_and_passed_over(run):
    """200 bytes changed, one at a time, and 50 lengths cut to."""
    folder = run / "checkpoints"
    older, newer = sorted(folder.iterdir())
    expected, whole, rng = load_tensors(older), newer.read_bytes(), random.Random(1)
    assert same(Checkpoints(folder).load_newest(pytest.fail), load_tensors(newer))
    damaged = []
    for position in sampled_positions(whole, 200):
        changed = bytearray(whole)
        changed[position] ^= rng.randrange(1, 256)
        damaged.append(bytes(changed))
    damaged += [whole[: round(i * (len(whole) - 1) / 49)] for i in range(50)]
    assert len(damaged) == 250
    assert {0, len(whole) - 1} <= {len(content) for content in damaged}
    for content in damaged:
        newer.write_bytes(content)
        before, warnings = contents(folder), []
        state = Checkpoints(folder).load_newest(warnings.append)
        assert same(state, expected)
        (warning,) = warnings
        assert str(newer) in warning
        assert "damaged" in warning
        assert contents(folder) == before, "nothing is deleted or mended"


def test_where_all_are_damaged_there_is_no_guessing(run):
    folder = run / "checkpoints"
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    before = contents(folder)
    with pytest.raises(UserError) as refused:
        Checkpoints(folder).load_newest(pytest.fail)
    assert_in_words(refused.value, str(folder), "none of the 2 checkpoints is intact", "--overwrite")
    assert contents(folder) == before


def test_several_damaged_ones_are_named_newest_first(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    files = [checkpoints.save(a_state(*position)) for position in ((1, 0), (1, 2), (1, 4))]
    for file in files[1:]:
        file.write_bytes(file.read_bytes() + b"\0")
    warnings = []
    assert Checkpoints(tmp_path).load_newest(warnings.append)["step"] == 0
    assert [str(file) in warning for file, warning in zip(files[:0:-1], warnings, strict=True)] == [True, True]


def test_damaged_ones_that_are_older_are_not_worth_a_word(run):
    older, newer = sorted((run / "checkpoints").iterdir())
    older.write_bytes(b"")
    assert same(Checkpoints(run / "checkpoints").load_newest(pytest.fail), load_tensors(newer))


def test_the_name_holds_the_hash_also_of_a_copy(run, tmp_path):
    files = sorted((run / "checkpoints").iterdir())
    for file, epoch in zip(files, (1, 2), strict=True):
        assert file.name == f"epoch-000{epoch}-step-000000-{hash_of(file.read_bytes())}.pt"
    shutil.copytree(run / "checkpoints", tmp_path / "copy")
    for file in (tmp_path / "copy").iterdir():
        assert file.name.split("-")[-1] == f"{hash_of(file.read_bytes())}.pt"
    copied = Checkpoints(tmp_path / "copy").load_newest(pytest.fail)
    assert same(copied, Checkpoints(run / "checkpoints").load_newest(pytest.fail))


def test_the_position_counts_and_not_when_a_file_was_written(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for age, position in enumerate(((9999, 1_000_000), (10_000, 0))):
        file = checkpoints.save(a_state(*position))
        os.utime(file, (10**9 - age, 10**9 - age))
    assert Checkpoints(tmp_path).load_newest(pytest.fail)["epoch"] == 10_000


def test_a_folder_without_checkpoints_is_that_of_a_run_that_has_none(tmp_path):
    assert Checkpoints(tmp_path / "missing").load_newest(pytest.fail) is None
    (tmp_path / "notes.txt").write_text("epoch 7")
    assert Checkpoints(tmp_path).load_newest(pytest.fail) is None


def test_between_epochs_only_those_without_steps_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    boundary = checkpoints.save(a_state(3, 0))
    for step in (1, 2, 3):
        checkpoints.save(a_state(3, step))
    assert Checkpoints(tmp_path).load_newest(pytest.fail)["step"] == 3
    assert Checkpoints(tmp_path).load_newest(pytest.fail, between_epochs=True)["step"] == 0
    boundary.write_bytes(b"")
    with pytest.raises(UserError, match="none of the 3 checkpoints of the end of an epoch is intact"):
        Checkpoints(tmp_path).load_newest(pytest.fail, between_epochs=True)


# What is kept


def is_whole(file):
    return file.name.endswith(f"-{hash_of(file.read_bytes())}.pt")


def position_of(file):
    return tuple(int(digits) for digits in re.findall(r"-(\d{4,6})(?=-)", file.name)[:2])


SAVES = st.tuples(st.just("save"), st.integers(0, 3))  # steps in the epoch before the save; 0 begins a new epoch
EVENTS = st.one_of(SAVES, SAVES, SAVES, st.tuples(st.sampled_from(["damage", "resume", "kill"]), st.integers(0, 9)))


@settings(max_examples=60)
@given(st.lists(EVENTS, min_size=10, max_size=40))
def test_the_newest_two_and_the_newest_from_between_epochs_are_kept_and_what_is_damaged_stays(events):
    """A run that is stopped, killed while it saves, resumed, and whose files are damaged, in any order.

    Of the whole files that were there before a save and the new one, the newest two remain and the newest from between
    two epochs; what is damaged or unknown remains to the bit.
    """
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "notes.txt").write_text("mine")
        checkpoints, epoch, step = Checkpoints(folder), 0, 0
        for count, (event, number) in enumerate(events):
            if event == "save":
                epoch, step = (epoch, step + number) if number else (epoch + 1, 0)
                before = contents(folder)
                damaged = {file.name for file in folder.glob("epoch*") if not is_whole(file)}
                new = checkpoints.save(a_state(epoch, step, number=count))
                assert is_whole(new)
                assert position_of(new) == (epoch, step)
                whole = sorted((before.keys() - damaged - {"notes.txt", "new.part"}) | {new.name})
                boundaries = [name for name in whole if "step-000000" in name]
                kept = {*whole[-2:], *boundaries[-1:]}
                assert contents(folder).keys() == kept | damaged | {"notes.txt"}
                assert (before | contents(folder)).items() == (contents(folder) | before).items(), "none has changed"
                continue
            if event == "damage" and (files := sorted(folder.glob("epoch*"))):
                file = files[number % len(files)]
                file.write_bytes(file.read_bytes()[:-1] if file.stat().st_size else b"x")
            if event == "kill":
                (folder / "new.part").write_bytes(b"half" * number)
            whole = [position_of(file) for file in folder.glob("epoch*") if is_whole(file)]
            checkpoints = Checkpoints(folder)
            try:
                state = checkpoints.load_newest(lambda _: None)
            except UserError:
                assert not whole
                return
            epoch, step = (state["epoch"], state["step"]) if state else (0, 0)
            assert (epoch, step) == max(whole, default=(0, 0))


def test_a_save_of_the_same_position_and_content_is_one_file(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(a_state(1, 0))
    assert checkpoints.save(a_state(1, 0)) == first
    assert list(tmp_path.iterdir()) == [first]


ODD = (
    "epoch-1.pt",
    "epoch-0099-0123456789abcdef.pt",
    "epoch-0099-step-000000-0123456789ABCDEF.pt",
    "epoch-0099-step-000000-0123456789abcde.pt",
    "epoch-0099-step-000000-0123456789abcdef.pt.part",
    "epoch--099-step-000000-0123456789abcdef.pt",
    "old epoch-0099-step-000000-0123456789abcdef.pt",
    "epoch-0099-step-000000-0123456789abcdef.pt ",
    ".pt",
    "model.pt",
)


def test_what_only_looks_like_a_checkpoint_is_left_alone(tmp_path):
    for name in ODD:
        (tmp_path / name).write_bytes(b"somebody's")
    (tmp_path / "epoch-0098-step-000000-0123456789abcdef.pt").mkdir()
    (tmp_path / "epoch-0097-step-000000-0123456789abcdef.pt").symlink_to("nowhere")
    (tmp_path / "epoch-0096-step-000000-0123456789abcdef.pt").symlink_to(tmp_path)
    strangers = set(tmp_path.iterdir())
    assert len(strangers) == len(ODD) + 3
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_newest(pytest.fail) is None
    for epoch, step in itertools.product(range(3), range(3)):
        checkpoints.save(a_state(epoch, step))
        assert Checkpoints(tmp_path).load_newest(pytest.fail)["step"] == step
    assert strangers < set(tmp_path.iterdir())
    assert len(set(tmp_path.iterdir()) - strangers) == 3
    assert all((tmp_path / name).read_bytes() == b"somebody's" for name in ODD)
    assert os.readlink(tmp_path / "epoch-0097-step-000000-0123456789abcdef.pt") == "nowhere"


def test_what_a_killed_save_has_left_does_not_hinder(train, run):
    (run / "checkpoints" / "new.part").write_bytes(b"half a checkpoint" * 100_000)
    resumed = train("run", *LITTLE, "policy=random", "--resume")
    assert len(list((resumed / "checkpoints").iterdir())) == 2
    assert final_state(resumed)["epoch"] == 3


# Whole or not at all


def test_the_file_is_on_the_disk_before_it_has_its_name_and_then_the_folder(tmp_path, monkeypatch):
    """Otherwise a power failure may leave the name, and nothing behind it."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        calls.append(("fsync", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        fsync(descriptor)

    def noted_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino, os.stat(source).st_size))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    folder = tmp_path / "checkpoints"
    file = Checkpoints(folder).save(a_state(1, 0))
    written = file.stat().st_ino, file.stat().st_size
    assert [name for name, *_ in calls] == ["fsync", "replace", "fsync"]
    assert calls[0][1:] == calls[1][1:] == written, "all of its bytes, before it is renamed"
    assert calls[2][1] == folder.stat().st_ino
    for write in (lambda path: write_text(path, "text"), lambda path: save_tensors(path, {"x": torch.ones(3)})):
        calls.clear()
        write(tmp_path / "file")
        inode = (tmp_path / "file").stat().st_ino
        assert [call[:2] for call in calls] == [("fsync", inode), ("replace", inode), ("fsync", tmp_path.stat().st_ino)]


def save_under_a_limit(folder, state, limit):
    """What a save says where no file may be larger than `limit` bytes."""
    checkpoints = Checkpoints(folder)
    checkpoints.load_newest(pytest.fail)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with pytest.raises(UserError) as refused:
        checkpoints.save(state)
    return str(refused.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.97])
def test_a_save_that_does_not_fit_leaves_the_one_before_and_says_how_much_is_needed(tmp_path, share):
    folder = tmp_path / "checkpoints"
    state = a_state(1, 0, size=250_000)
    Checkpoints(folder).save(state)
    before = contents(folder)
    limit = round(share * len(*before.values()))
    words = in_one_child(save_under_a_limit, folder, a_state(2, 0, size=250_000), limit)
    assert_in_words(words, str(folder), "cannot be written to (File too large, 1.0 MB are needed, ", " MB are free)")
    free = float(re.search(r"([\d,.]+) MB are free", words)[1].replace(",", ""))
    assert free == pytest.approx(shutil.disk_usage(folder).free / 1e6, rel=0.5)
    assert contents(folder) == before, "without new.part"
    assert same(Checkpoints(folder).load_newest(pytest.fail), state)


def test_a_run_whose_disk_fills_up_stops_in_two_lines_and_goes_on_exactly(train, script, tmp_path):
    reference = train("reference", *LITTLE)
    run = train("full", *LITTLE, "--stop_epoch=1")
    size = max(len(content) for content in contents(run / "checkpoints").values())
    before = contents(run / "checkpoints")

    def resume_under_a_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        as_script("main.py", "--resume", "--logdir", tmp_path, "--name", "full", "--set", *TINY, *LITTLE)()

    (done,) = start_ranks(1, resume_under_a_limit)
    assert_refused(done, "checkpoints: cannot be written to", "MB are needed", "MB are free")
    assert contents(run / "checkpoints") == before
    train("full", *LITTLE, "--resume")
    assert (run / "metrics.jsonl").read_bytes() == (reference / "metrics.jsonl").read_bytes()
    assert same(final_state(run), final_state(reference))


def save_without_rights(folder):
    """What a save says in a folder that may only be read; the superuser, who may all, becomes nobody for it."""
    os.chdir(folder.parent)  # those above may be the superuser's own
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    checkpoints = Checkpoints(Path(folder.name))
    checkpoints.load_newest(pytest.fail)
    with pytest.raises(UserError) as refused:
        checkpoints.save(a_state(2, 0))
    return str(refused.value)


def test_a_folder_that_may_only_be_read_is_named_and_left_as_it_was(tmp_path):
    folder = tmp_path / "checkpoints"
    file = Checkpoints(folder).save(a_state(1, 0))
    before = contents(folder)
    for path, mode in ((tmp_path, 0o755), (file, 0o644), (folder, 0o555)):
        path.chmod(mode)
    try:
        words = in_one_child(save_without_rights, folder)
    finally:
        folder.chmod(0o755)
    assert_in_words(words, "checkpoints: cannot be written to (Permission denied", "mend its permissions")
    assert contents(folder) == before
    assert Checkpoints(folder).load_newest(pytest.fail)["epoch"] == 1


@pytest.mark.parametrize("place", ["file", "dangling link", "below a file"])
def test_a_folder_that_is_none_is_named(tmp_path, place):
    folder = tmp_path / "checkpoints"
    if place == "file":
        folder.write_text("mine")
    elif place == "dangling link":
        folder.symlink_to("nowhere")
    else:
        (tmp_path / "above").write_text("mine")
        folder = tmp_path / "above" / "checkpoints"
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as refused:
        Checkpoints(folder).save(a_state(1, 0))
    assert_in_words(refused.value, str(folder), "cannot be created")
    assert sorted(tmp_path.iterdir()) == before


def failing_at(monkeypatch, place, error):
    """Let a write fail half-way, when it is flushed, or when it is renamed."""

    def fail(*_, **__):
        raise error

    def half(state, file):
        file.write(b"half a checkpoint")
        file.flush()
        raise error

    if place == "write":
        monkeypatch.setattr(torch, "save", half)
    else:
        monkeypatch.setattr(os, {"flush": "fsync", "rename": "replace"}[place], fail)


@pytest.mark.parametrize("place", ["write", "flush", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error")])
def test_a_disk_that_fails_at_any_moment_leaves_the_one_before(tmp_path, monkeypatch, place, error):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(a_state(1, 0))
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        failing_at(patched, place, error)
        with pytest.raises(UserError) as refused:
            checkpoints.save(a_state(2, 0))
    assert_in_words(refused.value, str(tmp_path), error.strerror, "MB are needed", "MB are free", "what was saved is")
    assert contents(tmp_path) == before
    checkpoints.save(a_state(2, 0))
    assert len(contents(tmp_path)) == 2, "and the next save goes its way"


@pytest.mark.parametrize("place", ["write", "flush", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_at_any_moment_leaves_the_one_before(tmp_path, monkeypatch, place, error):
    checkpoints = Checkpoints(tmp_path)
    state = a_state(1, 0)
    checkpoints.save(state)
    before = contents(tmp_path)
    with monkeypatch.context() as patched:
        failing_at(patched, place, error)
        with pytest.raises(error):
            checkpoints.save(a_state(2, 0))
    assert contents(tmp_path) == before
    assert same(Checkpoints(tmp_path).load_newest(pytest.fail), state)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_existing_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "config.yaml"
    write_text(path, "before: ä\n")
    assert path.read_bytes() == "before: ä\n".encode()

    def write(new):
        new.write_text("aft")
        raise error

    with pytest.raises((KeyboardInterrupt, UserError)):
        write_atomically(path, write)
    assert contents(tmp_path) == {"config.yaml": "before: ä\n".encode()}
    write_text(path, "after\n")
    assert contents(tmp_path) == {"config.yaml": b"after\n"}


def test_a_file_system_that_does_not_know_flushing_a_folder_is_put_up_with(tmp_path, monkeypatch):
    fsync = os.fsync

    def of_files_only(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    assert Checkpoints(tmp_path).save(a_state(1, 0)).exists()


# Content that is not to be trusted: the hash in the name is right, and what it is the hash of is not


class Touches:
    """Once a pickle of it is read by somebody who trusts it, there is a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def legacy(state):
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("write", [pickle.dumps, saved, legacy, lambda state: pickle.dumps(state, protocol=0)])
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_in_a_file_is_executed(tmp_path, write, inside):
    trace = tmp_path / "trace"
    content = a_state(2, 0) | {"model": Touches(trace)} if inside else Touches(trace)
    file = put(tmp_path / "checkpoints", write(content))
    with contextlib.suppress(Exception):  # it is what it is thought to be
        pickle.loads(write(content))
        assert trace.exists()
        trace.unlink()
    for read in (lambda: load_tensors(file), lambda: Checkpoints(file.parent).load_newest(pytest.fail)):
        with pytest.raises(UserError) as refused:
            read()
        assert_in_words(refused.value, str(file), "cannot be read as a checkpoint")
        assert len(str(refused.value)) < len(str(file)) + 250
    assert not trace.exists()
    assert file.exists()


def pickles():
    plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    nested = st.recursive(plain, lambda of: st.lists(of, max_size=4) | st.dictionaries(st.text(max_size=5), of))
    written = st.sampled_from([pickle.dumps, saved, legacy])
    return st.builds(lambda value, write: write(value), nested, written)


@settings(max_examples=200)
@given(st.binary(max_size=300) | pickles() | st.binary(max_size=100).map(lambda tail: b"PK\x03\x04" + tail))
def test_files_of_anything_are_refused_in_a_line(content):
    with tempfile.TemporaryDirectory() as folder:
        file = put(Path(folder), content)
        with pytest.raises(UserError) as refused:
            Checkpoints(Path(folder)).load_newest(pytest.fail)
        assert_in_words(refused.value, str(file))
        assert contents(Path(folder)) == {file.name: content}


def paths_in(value, at=()):
    """The place of every value in a nested state."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, item in items:
        yield from paths_in(item, (*at, key))


LEFT_OUT, TWICE = object(), object()


def changed(value, path, new):
    """A copy of a nested state in which the value at `path` is another."""
    if not path:
        return new
    key, *rest = path
    items = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    if rest or new not in (LEFT_OUT, TWICE):
        items[key] = changed(items[key], rest, new)
    elif new is LEFT_OUT:
        del items[key]
    else:
        items[f"{key}'" if isinstance(value, dict) else len(items)] = items[key]
    return items if isinstance(value, dict) else list(items.values())


# Other types, other shapes, numbers that no run comes to. tensor_(): hypothesis shows what makes it, not its digits.
NUMBERS = (None, True, 0, 1, -1, 3, 2**40, 2**70, -(2**70), 1.5, math.nan, math.inf, 1e300)
OTHERS = ("", "x", b"x", [], {}, (1,), [[]], {"x": 1}, [1, 2, 3, 4], torch.float32, torch.Size([1]))
TENSORS = (
    (1,),
    (math.nan,),
    (0, 0),
    (0, 3),
    (0.5, 2),
    (99, 2, 5, 2),
    (-7, 2, 5, 2),
    (0.5, 2, 5, 2),
    (0, 5056),
)


def wrong_values():
    tensors = st.sampled_from(TENSORS).map(lambda value_and_shape: torch.full(value_and_shape[1:], value_and_shape[0]))
    odd = st.sampled_from(["meta", "complex", "sparse"]).map(odd_tensor)
    return st.one_of(st.just(LEFT_OUT), st.just(TWICE), st.sampled_from(NUMBERS + OTHERS), tensors, odd)


def odd_tensor(kind):
    if kind == "sparse":
        return torch.ones(2).to_sparse()
    return torch.zeros(2, device="meta") if kind == "meta" else torch.zeros(2, dtype=torch.complex64)


class Resumption:
    """Resumes a run, as main.py does, from checkpoints that are made from its own."""

    def __init__(self, run):
        self.run, self.config = run, load_config(run / "config.yaml", {})
        self.template = Checkpoints(run / "checkpoints").load_newest(pytest.fail)
        self.places = list(paths_in(self.template))
        self.logs = {path: path.read_bytes() for path in run.glob("*.jsonl")}
        self.data = main.load_data(self.config, torch.device("cpu"), Downloads(None, False, quiet=True))

    def load(self, content):
        """A manager whose state is that of a checkpoint of this content; may raise UserError."""
        shutil.rmtree(self.run / "checkpoints")
        put(self.run / "checkpoints", content)
        state = TrainingState.start(self.config, ALONE, little_network("", 10))
        manager = RunManager(self.run, state, STEPS, self.template["data"])
        manager.load()
        return manager

    def go_on(self, content):
        """Load, and train for an epoch if there is one left. May raise UserError and FloatingPointError."""
        for path, log in self.logs.items():
            path.write_bytes(log)
        manager = self.load(content)
        with manager:
            if manager.state.epoch < self.config.epochs:
                main.run_epoch(manager.state, self.data, manager)

    def with_changes(self, changes):
        state = self.template
        for place, value in changes:
            with contextlib.suppress(KeyError, IndexError, TypeError, AttributeError):  # another one took it away
                state = changed(state, self.places[place % len(self.places)], value)
        return saved(state)


@pytest.fixture(params=["random", "controller"])
def resumption(train, request):
    said = ("policy_interval=3", "grad_clip=5", "--stop_epoch=2")
    return Resumption(train("trusted", *LITTLE, f"policy={request.param}", *said))


@pytest.mark.parametrize("resumption", ["random"], indirect=True)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ranks",), []),
        (("ranks",), None),
        (("ranks", 0, "devices"), torch.zeros(3)),
        (("ranks", 0, "skipped"), 2**70),
        (("epoch",), "2"),
        (("positions",), {}),
        (("positions", "times.jsonl"), LEFT_OUT),
        (("positions", "metrics.jsonl"), -1),
    ],
)
def test_what_a_state_cannot_be_is_refused_with_the_log_as_it_was(resumption, path, value):
    with pytest.raises(UserError) as refused:
        resumption.go_on(saved(changed(resumption.template, path, value)))
    assert_in_words(refused.value)
    assert {path: path.read_bytes() for path in resumption.logs} == resumption.logs


ONE_CHANGE = st.tuples(st.integers(0, 10**6), wrong_values()).map(lambda change: [change])
CHANGES = ONE_CHANGE | st.lists(st.tuples(st.integers(0, 10**6), wrong_values()), min_size=2, max_size=3)
# Each example is independent of the one before, and made smaller it would take minutes.
FUZZ = {"phases": [Phase.generate], "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def test_an_unchanged_state_is_taken(resumption):
    resumption.go_on(saved(resumption.template))


def test_every_missing_part_is_noticed(resumption):
    for key in resumption.template:
        content = saved({name: value for name, value in resumption.template.items() if name != key})
        with pytest.raises(UserError) as refused:
            resumption.load(content)
        assert_in_words(refused.value, str(resumption.run))
        assert list(contents(resumption.run / "checkpoints").values()) == [content]
        assert {path: path.read_bytes() for path in resumption.logs} == resumption.logs


def refused_or_loaded(resumption, changes):
    try:
        resumption.load(resumption.with_changes(changes))
    except UserError as refused:
        assert_in_words(refused)


def refused_or_gone_on_from(resumption, changes):
    """To the end of its epoch, or until its numbers are found not to be finite."""
    try:
        resumption.go_on(resumption.with_changes(changes))
    except UserError as refused:
        assert_in_words(refused)
    except FloatingPointError:
        pass


@settings(max_examples=150, **FUZZ)
@given(changes=CHANGES)
def test_a_state_of_another_form_is_refused_in_words(resumption, changes):
    refused_or_loaded(resumption, changes)
