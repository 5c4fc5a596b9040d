"""Damaged and hostile checkpoints, arrays and images: refused in one or two lines, nothing executed or written."""

import contextlib
import functools
import importlib
import io
import os
import pickle
import shlex
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import EDITS, NO_FILE, assert_in_words, edited, names, no_endless_read, refusal  # noqa: F401
from PIL import Image

import evaluation.benchmarks as benchmarks
from config import Config, load_config, plain_values
from datasets.imagefiles import CentreCrop, FileCheck, FitSquare, ImageFiles, RandomCrop
from datasets.loading import load_data
from models import build_model
from utils import has_shape, load_tensors

CPU = torch.device("cpu")


class Payload:
    """Calls a function when it is unpickled without restrictions."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """So that a payload can be the function of another."""


def saved(save, content, **how):
    file = io.BytesIO()
    save(content, file, **how) if save is torch.save else save(file, content, **how)
    return file.getvalue()


# Checkpoints


def payloads(trace):
    """Code in a pickle; each would write `trace`."""
    command, code = f"touch {shlex.quote(str(trace))}", f"open({str(trace)!r}, 'w')"
    inner = saved(torch.save, Payload(os.system, command))
    return {
        "os.system": Payload(os.system, command),
        "exec": Payload(exec, code),
        "a process": Payload(subprocess.check_call, ["touch", str(trace)]),
        "a method of a path": Payload(Path.touch, trace),
        "getattr": Payload(Payload(getattr, Payload(importlib.import_module, "os"), "system"), command),
        "torch.load": Payload(functools.partial(torch.load, weights_only=False), io.BytesIO(inner)),
        "torch's own bytes": Payload(torch.storage._load_from_bytes, inner),
    }


def tar_of_pickles(payload):
    """The format of torch before 0.1.10."""
    file, content = io.BytesIO(), pickle.dumps(payload)
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


FORMATS = {
    "zip": lambda payload: saved(torch.save, {"model": payload}),
    "older": lambda payload: saved(torch.save, {"model": payload}, _use_new_zipfile_serialization=False),
    "tar": tar_of_pickles,
    "pickle": lambda payload: pickle.dumps({"model": payload}, protocol=2),
}
WEIGHT = saved(torch.save, {"weight": torch.arange(6.0)})


def repacked(change=lambda name, content: content, compression=zipfile.ZIP_STORED, more=(), content=WEIGHT):
    """A file of torch.save, its entries replaced by change(name, content), or removed where that is None."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w", compression) as after:
        for name in before.namelist():
            new = change(name.split("/", 1)[1], before.read(name))
            if new is not None:
                after.writestr(name, new)
        for name, new in more:
            after.writestr(name, new)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_code_in_a_checkpoint_is_not_executed(tmp_path, form):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    for name, payload in payloads(trace).items():
        path.write_bytes(FORMATS[form](payload))
        message = refusal(load_tensors, path)
        assert "do not trust it" in message or "cannot be read" in message, name
        assert "weights_only" not in message, "no advice to execute it"
        assert names(tmp_path) == ["a.pt"], name
        with contextlib.suppress(Exception):  # where a reader allows it, the payload runs: else this would show nothing
            pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)
        trace.unlink()


def test_more_files_in_a_checkpoint_are_not_executed(tmp_path):
    path, trace = tmp_path / "a.pt", tmp_path / "trace"
    code, evil = f"open({str(trace)!r}, 'w')".encode(), pickle.dumps(payloads(trace)["os.system"], protocol=2)
    for more in (
        [("archive/constants.pkl", evil), ("archive/code/__torch__.py", code)],
        [("data.pkl", evil)],
        [("../trace", b"x"), (str(trace), b"x")],
    ):
        path.write_bytes(repacked(more=more))
        refusal(load_tensors, path)
        assert names(tmp_path) == ["a.pt"]


def claiming(size, of):
    """A compressed checkpoint whose directory says that the entry `of` has `size` bytes."""
    content = bytearray(repacked(compression=zipfile.ZIP_DEFLATED))
    at = content.index(b"PK\1\2")
    while content[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<HHH", content, at + 28)
        if content[at + 46 : at + 46 + lengths[0]].endswith(of):
            struct.pack_into("<I", content, at + 24, size)
        at += 46 + sum(lengths)
    return bytes(content)


def in_pickle(old, new):
    return repacked(lambda name, content: content.replace(old, new) if name == "data.pkl" else content)


@pytest.mark.parametrize(
    "content",
    [
        repacked(lambda name, content: content[:8] if name == "data/0" else content),
        repacked(lambda name, content: None if name == "data/0" else content),
        repacked(lambda name, content: None if name == "data.pkl" else content),
        repacked(lambda name, content: content[:-1] if name == "data.pkl" else content),
        repacked(lambda name, content: b"middle" if name == "byteorder" else content),
        in_pickle(b"K\x06", b"M\xe8\x03"),  # 6 numbers given out as 1000
        in_pickle(b"FloatStorage", b"DoubleStorage"),
        in_pickle(b"K\0K\6\x85", b"K\1K\6\x85"),
        in_pickle(b"K\0K\6\x85", b"J\xff\xff\xff\xffK\6\x85"),
        in_pickle(b"K\1\x85", b"J\xff\xff\xff\xff\x85"),
        claiming(0xFFFFFFF0, of=b"data/0"),
        claiming(0xFFFFFFF0, of=b"data.pkl"),
        repacked(compression=zipfile.ZIP_DEFLATED, content=saved(torch.save, {"weight": torch.zeros(10**7)})),
        WEIGHT[:100],
        b"",
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert_in_words(refusal(load_tensors, path), "a.pt: cannot be read as a checkpoint (")


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.usefixtures("no_endless_read")
def test_what_is_no_regular_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.x"
    NO_FILE[kind](path)
    assert_in_words(refusal(load_tensors, path), str(path))
    assert_in_words(refusal(benchmarks._labels, path, 5, 10), str(path))
    for reason in reasons_against(path):
        assert_in_words(reason, f"{path} (")


def model_pt(path, **other):
    own = plain_values(Config(dataset="shapes", model="wresnet10_1"))
    content = {"model": build_model("wresnet10_1", 10).state_dict(), "classes": list("abcdefghij"), "epoch": 1}
    torch.save(content | {"config": own} | other, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {"stem.weight": [1, 2]},
        lambda weights: {3: torch.zeros(3)},
        lambda weights: weights | {"classifier.weight": torch.zeros(10, 64).to_sparse()},
        lambda weights: weights | {"classifier.weight": torch.zeros(10, 64, device="meta")},
        lambda weights: weights | {"x" * 10**5: torch.zeros(1)},
        lambda weights: weights | {"x\n\x1b[31m": torch.zeros(1)},
    ],
)
def test_weights_that_do_not_fit_are_refused(script, tmp_path, change):
    weights, path = change(build_model("wresnet10_1", 10).state_dict()), tmp_path / "model.pt"
    for what in (("--checkpoint", path), ("--model", "wresnet10_1", "--weights", path, "--set", "dataset=shapes")):
        torch.save(weights, path) if "--weights" in what else model_pt(path, model=weights)
        done = script("evaluate.py", *what)
        assert_refused(done, f"{path}: ")
        assert_in_words(done.err.strip())


HUGE = plain_values(Config(dataset="shapes", model="wresnet28_1000"))  # 1.5 TB


@pytest.mark.parametrize(
    "other",
    [{"epoch": -1}, {"epoch": 1 << 20000}, {"classes": ["x" * 10**5] * 10}, {"classes": []}, {"config": HUGE}],
    ids=lambda other: next(iter(other)),
)
def test_a_model_file_with_wrong_values_is_refused(script, tmp_path, other):
    done = script("evaluate.py", "--checkpoint", model_pt(tmp_path / "model.pt", **other))
    assert_refused(done)
    assert_in_words(done.err.strip())


SMALL = {
    "model": {"weight": torch.arange(6.0), "count": torch.tensor(3), "half": torch.zeros(3, dtype=torch.bfloat16)},
    "classes": ["a", "b"],
    "epoch": 1,
    "config": {"lr": 0.1, "ops": ["Rotate", "Invert"], "train_size": None, "model": "wresnet10_1"},
}
NEW, OLD = (saved(torch.save, SMALL, _use_new_zipfile_serialization=new) for new in (True, False))


def read_as_evaluate_does(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(content)
        read = load_tensors(path)
        if has_shape(read, {"model": dict, "classes": [str], "config": dict, "epoch": int}):
            load_config(None, {field: (str(path), value) for field, value in read["config"].items()})


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=100)
@given(st.sampled_from(["file", "pickle", "entries", "older file"]), EDITS)
def test_random_damage_to_a_checkpoint_is_refused(what, edits):
    """In the file, or in the entries of the zip file, with right checksums."""
    if what in ("file", "older file"):
        content = edited(NEW if what == "file" else OLD, edits)
    else:
        content = repacked(lambda n, c: edited(c, edits) if (n == "data.pkl") == (what == "pickle") else c, content=NEW)
    refusal(read_as_evaluate_does, content)


KEYS = st.sampled_from(list(Config.__dataclass_fields__)) | st.integers() | st.text(max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
    | st.sampled_from(["cifar10", "Rotate", "/outside", torch.zeros(3), torch.Size([3]), torch.half, CPU, 1 << 9999]),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), items, max_size=3)
    | st.tuples(items) | st.sets(st.integers(), max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=60)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_random_settings_in_a_checkpoint_are_refused(values):
    refusal(read_as_evaluate_does, saved(torch.save, SMALL | {"config": values}))


# Arrays


def npy(shape="(5, 32, 32, 3)", descr="'|u1'", fortran="False", *, version=(1, 0), length=None, header=None, body=None):
    header = header or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header) if length is None else length)
    body = bytes(5 * 32 * 32 * 3) if body is None else body
    return b"\x93NUMPY" + bytes(version) + size + header.encode("latin1") + body


def arrays(trace):
    evil = Payload(os.system, f"touch {shlex.quote(str(trace))}")
    return {
        "objects": saved(np.save, np.array([evil], dtype=object)),
        "objects in a record": npy(descr="[('a', '|O'), ('b', '|u1')]", body=pickle.dumps(evil)),
        "a pickle": pickle.dumps(evil),
        "a zip file": saved(np.savez, np.array([evil], dtype=object)),
        "a record": npy(descr="[('a\\n\\x1b[31m', '|u1')]"),
        "a long record": npy(descr=repr([(f"f{i}", "|u1") for i in range(400)]), body=bytes(10**7)),
        "code for a shape": npy(f"(open({str(trace)!r}, 'w'),)"),
        "no end": npy(header="(" * 9000),
        "no header": npy(header="{}"),
        "a negative shape": npy("(-5, 32, 32, 3)"),
        "a shape that overflows": npy(f"({2**40}, {2**40}, 32, 3)"),
        "a shape beyond 64 bits": npy(f"({2**70}, 32, 32, 3)"),
        "a shape of 3000 sides": npy("(" + "1, " * 3000 + ")"),
        "a shape of text": npy("('a', 32, 32, 3)"),
        "more than there is": npy("(1000000000, 32, 32, 3)"),
        "column order": npy(fortran="True"),
        "an unknown type": npy(descr="'xyz'"),
        "huge items": npy(descr="'V2000000000'"),
        "no version": npy(version=(9, 9)),
        "a header of 1 GB": npy(version=(2, 0), length=1 << 30),
        "truncated": npy(body=bytes(99)),
        "empty": b"",
    }


@pytest.mark.parametrize("kind", arrays("trace"))
def test_hostile_arrays_are_refused(tmp_path, recwarn, kind):
    path = tmp_path / "a.npy"
    path.write_bytes(arrays(tmp_path / "trace")[kind])
    assert_in_words(refusal(benchmarks._array, path, "images", lambda shape: True), f"{path}: ")
    assert_in_words(refusal(benchmarks._labels, path, 5, 10), f"{path}: ")
    assert names(tmp_path) == ["a.npy"]
    assert not list(recwarn)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=100)
@given(st.sampled_from([npy(), npy("(5,)", body=bytes(5))]), EDITS)
def test_random_damage_to_an_array_is_read_or_refused(content, edits):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npy"
        path.write_bytes(edited(content[:140], edits) + content[140:])
        refusal(benchmarks._array, path, "images", lambda shape: True)
        refusal(benchmarks._labels, path, 5, 10)


# Images


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *, first=b"", last=b""):
    """A black picture, with chunks before or after the pixels, which end after nine rows."""
    rows = zlib.compress(bytes((1 + 3 * width) * min(height, 9)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + first + chunk(b"IDAT", rows) + last + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(1 << 24))
PAGE = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
IMAGES = {
    "60000.png": (png(60_000, 60_000), "3600000000 pixels"),
    "strip.png": (png(2, 9000), "is too narrow: 2 by 9000 pixels"),
    "none.png": (png(0, 5), "cannot identify"),
    "text.png": (png(4, 4, first=chunk(b"zTXt", b"Comment\0\0" + BOMB)), "Decompressed data too large"),
    "colour.png": (png(4, 4, first=chunk(b"iCCP", b"x\0\0" + BOMB)), "Decompressed data too large"),
    "texts.png": (png(4, 4, first=chunk(b"tEXt", b"a\0" + bytes(10**6)) * 70), "Too much memory used in text chunks"),
    "large.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6), "pixels"),
    "below.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, -5, 1, 24, *[0] * 6), "pixels"),
    "large.ppm": (b"P6 60000 60000 255\n", "pixels"),
    "page.png": (PAGE, "cannot identify"),
    "page.jpg": (PAGE, "cannot identify"),
    "code.png": (pickle.dumps(os.system), "cannot identify"),
    "a\n\x1b[31m.png": (b"", r"a\n\x1b[31m.png (cannot identify"),
}


def reasons_against(path):
    """Why each way to read an image refuses it, the quick check first."""
    ways = (FileCheck(), FitSquare(8), RandomCrop(8, flip=True), CentreCrop(9, 8))
    return [ImageFiles([path], way)[0, 0][2] for way in ways]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that Pillow might call to draw a page; the file that shows that it ran."""
    (tmp_path / "bin").mkdir()
    program, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(ran))}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return ran


@pytest.mark.parametrize("name", IMAGES)
def test_hostile_images_are_refused(tmp_path, ghostscript, recwarn, name):
    content, words = IMAGES[name]
    (tmp_path / name).write_bytes(content)
    for reason in reasons_against(tmp_path / name):
        assert_in_words(reason, words)
    assert not ghostscript.exists()
    assert not list(recwarn)


def test_a_bomb_behind_the_pixels_is_found_when_decoding(tmp_path):
    (tmp_path / "a.png").write_bytes(png(4, 4, last=chunk(b"zTXt", b"Comment\0\0" + BOMB)))
    assert all("Decompressed data too large" in reason for reason in reasons_against(tmp_path / "a.png")[1:])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_images_are_refused(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC).save(path)
    whole = path.read_bytes()
    assert reasons_against(path) == [None] * 4
    for part in range(20):
        path.write_bytes(whole[: part * (len(whole) - 30) // 19])
        for reason in reasons_against(path):
            assert_in_words(reason, f"{path} (")


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_hostile_images_in_a_folder_are_named_or_skipped(tmp_path, capsys, recwarn, dataset):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / place / "fine.png")
    for name, (content, _) in IMAGES.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    own = {"dataset": dataset, "dataroot": str(tmp_path), "image_size": 8, "eval_view": (9, 8), "crop_padding": 0}
    bad = f"{len(IMAGES)} of {len(IMAGES) + 2} images"
    message = refusal(load_data, Config(**own, batch_size=2, workers=0), CPU)
    assert_in_words(message, f"{bad} cannot be read, first ", "skip_unreadable=true")
    data = load_data(Config(**own, batch_size=2, workers=0, skip_unreadable=True), CPU)
    assert data.train.labels.tolist() == [0, 1]
    assert f"{bad}, first " in capsys.readouterr().err
    assert not list(recwarn)
