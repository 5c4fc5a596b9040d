"""Files that were made to do harm, or have come to harm: refused in our own words, nothing executed, nothing written
where it does not belong."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import lzma
import os
import pickle
import re
import shlex
import signal
import string
import struct
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_download import MALICIOUS, names, pack
from torch.package import PackageExporter

import config
import evaluation.benchmarks as robustness
from config import LONGEST_CONF, Config, load_config, overrides_from, plain_values, run_directory, stays_below
from datasets.download import Remote, unpack
from datasets.imagefiles import CentreCrop, FileCheck, FitSquare, ImageFiles, RandomCrop
from datasets.loading import load_data
from evaluation.corruptions import STANDARD
from models import build_model
from utils import UserError, has_shape, load_tensors, short_repr

CPU = torch.device("cpu")
FIELDS = list(Config.__dataclass_fields__)


def assert_in_words(message, *words, most=600):
    """One or two lines that fit a terminal and do nothing to it."""
    lines = message.split("\n")
    assert 1 <= len(lines) <= 2, message
    assert all(line.isprintable() for line in lines), message
    assert len(message) <= most, len(message)
    assert all(word in message for word in words), message


def refusal(read, *arguments):
    """What a reader says against a file, once that is known to be in our own words; None where it takes it."""
    try:
        read(*arguments)
    except UserError as error:
        assert_in_words(str(error))
        return str(error)
    return None


# Confs


@pytest.fixture
def conf(tmp_path):
    def write(content):
        path = tmp_path / "theirs.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def laughs(kind, depth=30):
    """Ten lines, or thirty, that stand for 10^30 items: each holds the one before ten times."""
    lines = [f"a{i}: &a{i} {kind.format(','.join([f'*a{i - 1}'] * 10))}" for i in range(1, depth)]
    return "\n".join(["a0: &a0 {x: 1, y: 2}", *lines])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (laughs("[{}]") + "\nlr: *a29", ["unknown setting 'a0'"]),
        (laughs("{{<<: [{}]}}"), ["line 2: '<<' has no meaning in a conf file"]),
        ("<<: {lr: 1}", ["line 1: '<<' has no meaning"]),
        ("lr: &a [*a]", ["lr: [[[...]]] is not a number"]),
        ("ops: &a [*a, *a]", ["ops: [[[...], [...]], [[...], [...]]] is not a text"]),
        ("lr: &a {b: *a}", ["is not a number"]),
        ("? &a {*a : 1}\n: 1", ["line 1: is not YAML"]),
        ("lr: 0x" + "F" * 5000, ["lr: <20000 bits> is not a number"]),
        ("M: 0x" + "F" * 5000, ["M: <20000 bits> is not between 1 and 10000"]),
        ("image_size: 0x" + "F" * 60000, ["image_size: <240000 bits> is not between 8 and 16384"]),
        ("? 0x" + "F" * 5000 + "\n: 1", ["unknown setting <20000 bits>"]),
        ("M: " + ":".join(["59"] * 20000), ["M: <", "bits> is not between 1 and 10000"]),
        ("policy: " + "x" * 60000, ["policy: 'xxx", "xxx' is not one of controller, random, none"]),
        ("model: " + "x" * 60000, ["model: 'xxx", "too long for the name of a network"]),
        ("model: wresnet" + "9" * 5000 + "_1", ["too long"]),
        ("x" * 60000 + ": 1", ["is not YAML"]),
        ("? " + "x" * 60000 + "\n: 1", ["unknown setting 'xxx"]),
        ("lr: *" + "x" * 60000, ["line 1: is not YAML (found undefined alias 'xxx"]),
        ("lr: !!" + "x" * 60000 + " 1", ["line 1: is not YAML (could not determine a constructor"]),
        ("milestones: [" + "1," * 5000 + "]", ["milestones: (1, 1, 1, 1, 1, 1, ...) must rise"]),
        ("ops: [" + "Rotate," * 5000 + "]", ["names an operation twice"]),
        ('policy: "a\\n\\e[31m\\0"', [r"policy: 'a\n\x1b[31m\x00' is not one of"]),
        ('"l\\nr": 1', [r"unknown setting 'l\nr'"]),
        ('model: "' + r"\U000e0001" * 60 + '"', ["model: unknown model"]),
        ('ops: ["\\e[2J"]', [r"unknown operation '\x1b[2J'"]),
        ("ops: [" + "x" * 60000 + "]", ["ops: ('xxx", "unknown operation 'xxx"]),
        ('dataroot: "a\\0b"', [r"dataroot: 'a\x00b' cannot be the name of a folder"]),
        ('dataroot: "\\ud800"', [r"dataroot: '\ud800' cannot be the name of a folder"]),
        ("lr: !!python/object/apply:os.system ['touch trace']", ["is not YAML (could not determine a constructor"]),
        ("lr: !!python/name:os.system", ["is not YAML (could not determine a constructor"]),
        ("!!python/object/new:os.system ['touch trace']", ["is not YAML (could not determine a constructor"]),
        ("{" * 600, ["is not YAML"]),
        ("{a: " * 3000, ["is not YAML (maximum recursion depth exceeded"]),
        ("- " * 3000, ["is not YAML (maximum recursion depth exceeded"]),
        ("lr: 2001-01-01", ["lr: datetime.date(2001, 1, 1) is not a number"]),
        ("2001-01-01: 1", ["unknown setting datetime.date(2001, 1, 1)"]),
        ("lr: !!binary " + "A" * 60000, [r"lr: b'\x00\x00", "is not a number"]),
        ("lr: !!set {a, b}", ["lr: {'a', 'b'} is not a number"]),
        ("? [a, b]\n: 1", ["line 1: is not YAML (found unhashable key)"]),
        (".nan: 1", ["unknown setting nan"]),
        ("null: 1", ["unknown setting None"]),
        ("lr: 1.0e+400", ["lr: inf is not finite"]),
        ("mean: [.nan, 0, 0]", ["mean: (nan, 0.0, 0.0) is not finite"]),
        ("lr: 1\nM: 2\n'lr': 3", ["line 3: 'lr' has been said on line 1 already"]),
        ("{lr: 1, lr: 1}", ["line 1: 'lr' has been said on line 1 already"]),
        ("lr: {a: 1, a: 2}", ["line 1: 'a' has been said on line 1 already"]),
        ("lr: 1\n---\nlr: 2", ["is not YAML (but found another document)"]),
        (b"lr: 1\0", ["is not YAML"]),
        (b"lr: \x1b[31m", ["is not YAML"]),
        (b"\xff\xfel\0r\0", ["cannot be read as a conf file ('utf-8' codec can't decode byte 0xff"]),
        (b"lr: \xc3\x28", ["cannot be read as a conf file ('utf-8' codec can't decode"]),
        (b"\xed\xa0\x80: 1", ["cannot be read as a conf file ('utf-8' codec can't decode"]),
        ("#" * LONGEST_CONF + "\n", [f"cannot be read as a conf file (is longer than {LONGEST_CONF} bytes)"]),
        ("model: wresnet28_999999", ["model: the width of a wide ResNet is 1 to 1000, not 999999"]),
        ("model: wresnet999999_1", ["model: the depth of a wide ResNet"]),
        ("model: wresnet1600000000000000000000000000000000000000000_1", ["model: the depth of a wide ResNet"]),
        ("model: shakeshake26_2x99999999d", ["model: the width of a Shake-Shake network is even, 2 to 10000"]),
        ("model: shakeshake99999998_2x32d", ["model: the depth of a Shake-Shake network"]),
        ("model: pyramid272_99999999", ["model: the alpha of a PyramidNet is 1 to 10000"]),
        ("model: pyramid99999999_200", ["model: the depth of this PyramidNet"]),
        ("model: resnet99999999", ["model: the depth of a ResNet"]),
    ],
)  # fmt: skip
def test_a_conf_that_was_made_to_do_harm_is_refused_in_a_few_words(conf, tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = conf(content)
    message = refusal(load_config, path, {})
    assert message is not None
    assert message.startswith(str(path))
    assert_in_words(message, *words)
    assert names(tmp_path) == ["theirs.yaml"]


def test_a_byte_order_mark_is_no_harm(conf):
    assert load_config(conf(b"\xef\xbb\xbflr: 0.5"), {}).lr == 0.5


@pytest.mark.parametrize("name", ["wresnet28_1000", "shakeshake26_2x10000d", "pyramid272_10000"])
def test_a_network_of_terabytes_is_checked_without_them(conf, name):
    """Any of these would take more memory than there is, or half an hour to fill with random numbers."""
    assert load_config(conf(f"model: {name}"), {}).model == name


NO_FILE = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nothing"),
}


@pytest.fixture
def impatient():
    """Ends a wait, or reading without an end, with what no reader catches."""

    def give_up(*_):
        raise SystemExit("has waited for a minute")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", NO_FILE)
def test_a_conf_that_is_no_file_is_not_waited_for(tmp_path, impatient, kind):
    path = tmp_path / "theirs.yaml"
    NO_FILE[kind](path)
    words = "there is no such conf file" if kind == "link to nothing" else "cannot be read as a conf file"
    assert_in_words(refusal(load_config, path, {}), f"theirs.yaml: {words}")


@pytest.fixture(scope="module")
def cheap_models():
    """Most draws ask for the same few networks: each is looked at once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(config, "check_model", functools.cache(config.check_model))
        yield


def text_is_read_or_refused(content):
    with tempfile.TemporaryDirectory() as folder:
        trace, path = Path(folder) / "trace", Path(folder) / "a.yaml"
        path.write_bytes(content.replace(b"TRACE", bytes(trace)))
        refusal(load_config, path, {})
        assert not trace.exists()


@settings(max_examples=150)
@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content):
    text_is_read_or_refused(content)


def in_quotes(text):
    return json.dumps(text)  # whose escapes are YAML's


SCALARS = st.one_of(
    st.integers(-3, 300).map(str),
    st.integers(-(10**12), 10**12).map(str),
    st.integers(1, 20_000).map(lambda digits: "0x" + "F" * digits),
    st.floats(width=32).map(str),
    st.text(max_size=20).map(in_quotes),
    st.sampled_from([
        "~", "true", "no", ".inf", "-.inf", ".nan", "1e400", "1.0e+400", "5e-4", "0o17", "0b11", "1_000", "1:30:00",
        "2001-01-01", "2001-12-14t21:59:43.10-05:00", "!!binary aGk=", "!!str 1", "!!float 1", "!!null x",
        "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]", "&b [*b]", "&c {x: *c}", "*a", '"\\ud800"', '"\\0"',
        "cifar10", "imagenet", "folder", "step", "cosine", "random", "none", "Rotate", "[Rotate, Invert]", "../x", "/x",
        "wresnet28_10", "wresnet28_99999", "shakeshake26_2x31d", "pyramid272_200", "resnet50", "resnet50d", "resnet51",
    ]),
)  # fmt: skip
SPOILT = st.text(string.printable, max_size=12) | st.sampled_from([
    "!!python/object/apply:os.system ['touch TRACE']", "!!python/name:os.system ''", "!!python/tuple [1]", "!!int x",
    "!!timestamp x", "2001-13-45", "! x", "!x y", "=", "<<", "{<<: *a}", "|\n  x\n  y", ">-\n  x", "# x", "'", "*d",
])  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda items: st.one_of(
        st.lists(items, max_size=4).map(lambda of: f"[{', '.join(of)}]"),
        st.lists(st.tuples(items, items), max_size=3).map(lambda of: f"{{{', '.join(f'{k}: {v}' for k, v in of)}}}"),
        st.tuples(st.sampled_from([2, 3, 9, 99]), items).map(lambda of: "[" * of[0] + of[1] + "]" * of[0]),
    ),
    max_leaves=6,
)


def mostly(usual, odd):
    """One in ten is odd, so that most documents come to their last line."""
    return st.tuples(st.integers(0, 9), usual, odd).map(lambda drawn: drawn[1] if drawn[0] else drawn[2])


FIELD = st.sampled_from(FIELDS)
KEYS = mostly(FIELD, SCALARS | st.sampled_from(["lrr", "<<", "? x\n", "- ", "'lr'", "!!str lr"]))
PAIRS = st.tuples(KEYS, mostly(SCALARS | VALUES, SPOILT))


@settings(max_examples=350)
@given(st.lists(PAIRS, max_size=4, unique_by=lambda pair: pair[0]))
@pytest.mark.usefixtures("cheap_models")
def test_any_values_of_the_settings_are_read_or_refused(pairs):
    text_is_read_or_refused("\n".join(map(": ".join, pairs)).encode("utf-8", "surrogatepass"))


def edited(content, edits):
    """Bytes after edits (kind, where, how many, a byte): overwritten, inserted, left out, or there twice."""
    content = bytearray(content)
    for kind, where, length, byte in edits:
        start = where % (len(content) + 1)
        part = content[start : start + length]
        new = {"flip": bytes(b ^ byte for b in part[:1]), "insert": part + bytes([byte]), "delete": b""}
        content[start : start + (1 if kind == "flip" else length)] = new.get(kind, part + part)
    return bytes(content)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "insert", "delete", "repeat"]),
        st.integers(0, 10**6),
        st.integers(1, 60),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=5,
)
CONFS = [path.read_bytes() for path in sorted((ROOT / "confs").glob("*.yaml"))]
# A run's own, with all settings; without comments, every edit tells.
PLAIN_CONFS = [config.to_yaml(Config()).encode(), *(yaml.safe_dump(yaml.safe_load(text)).encode() for text in CONFS)]


@settings(max_examples=250)
@given(st.sampled_from([*CONFS, *PLAIN_CONFS, *PLAIN_CONFS]), EDITS)
@pytest.mark.usefixtures("cheap_models")
def test_any_damage_to_a_conf_is_read_or_refused(content, edits):
    text_is_read_or_refused(edited(content, edits))


@settings(max_examples=200)
@given(st.lists(mostly(PAIRS.map("=".join), st.text(max_size=30)), max_size=3))
@pytest.mark.usefixtures("cheap_models")
def test_any_words_of_the_command_line_are_read_or_refused(words):
    said = argparse.Namespace(set=words, load_conf=None)
    refusal(lambda: load_config(None, overrides_from(said)))


def test_values_that_no_yaml_can_hold_are_shown_shortly():
    """A checkpoint's settings are read by the same reader, and hold what pickles hold."""
    nested = torch.nn.Parameter(torch.zeros(3))
    deep = OrderedDict(a=1)
    for _ in range(40):
        deep = OrderedDict(a=deep, b=deep, c=deep)
    for value in (nested, deep, torch.zeros(()).expand(10**15), {nested: deep}, {1: [deep] * 9}, 1j, bytearray(10**6)):
        message = refusal(load_config, None, {"lr": ("their.pt", value)})
        assert_in_words(message, "their.pt: lr: ", "is not a number", most=250)
    assert short_repr(deep) == "<OrderedDict>"
    message = refusal(load_config, None, {nested: ("their.pt", 1)})
    assert message == "their.pt: unknown setting <Parameter>"


# Places


@settings(max_examples=200)
@given(st.lists(st.sampled_from(["a", "..", ".", "", "~", "...", "..a", "~b"]) | st.text(max_size=3), max_size=6))
def test_a_path_stays_below_where_the_system_says_so(parts):
    path = "/".join(parts)
    if "\0" in path or not path.isascii():
        return
    leads_to = os.path.abspath(os.path.join("/here/there", path))
    below = os.path.commonpath(["/here/there", leads_to]) == "/here/there"
    assert stays_below(path) == (below and not os.path.normpath(path).startswith("~"))


OUTSIDE = ["/outside", "..", "../outside", "a/../../outside", "./../outside", "~", "~/outside", "./~me", "//outside"]


@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.parametrize("start", ["main.py", "evaluate.py"])
def test_a_conf_cannot_have_data_put_outside_the_working_directory(script, conf, tmp_path, start, place):
    path = conf(f"dataset: cifar10\ndataroot: '{place}'")
    message = f"error: {path}: dataroot: '{place}' leads out of the working directory"
    done = script(start, "--load_conf", path, "--no-download", "--logdir", tmp_path / "logs")
    assert_refused(done, message, "--dataroot DIR")
    assert_in_words(done.err.strip())
    assert names(tmp_path) == ["theirs.yaml"]


@pytest.mark.parametrize("said", [("--dataroot", "{}"), ("--set", "dataroot={}")])
def test_what_the_command_line_says_of_places_goes(script, conf, tmp_path, said):
    path = conf(f"dataset: cifar10\ndataroot: {tmp_path / 'theirs'}")
    done = script("evaluate.py", "--list", "--load_conf", path, *(word.format(tmp_path / "mine") for word in said))
    assert done.status == 0, done.err
    assert f"which of them are in {tmp_path / 'mine'}" in done.out
    assert names(tmp_path) == ["theirs.yaml"]


@pytest.mark.parametrize("place", [".", "data", "./data/../other", "a/b/c", "..data", "a~", ""])
def test_a_conf_may_name_a_place_in_the_working_directory(conf, place):
    said = argparse.Namespace(set=[], load_conf=conf(f"dataroot: '{place}'"))
    assert load_config(said.load_conf, overrides_from(said)).dataroot == place


def test_a_run_is_resumed_where_its_data_lie_but_its_config_is_a_conf_like_any_other(script, train, tmp_path):
    said = ("--dataroot", tmp_path / "data")
    of_run = ("--logdir", tmp_path, "--name", "own")
    assert script("main.py", *of_run, *said, "--stop_epoch", 1, "--set", *TINY).status == 0
    done = script("main.py", *of_run, *said, "--resume", "--stop_epoch", 1, "--set", *TINY)
    assert done.status == 0, done.err
    again = ("--load_conf", tmp_path / "own" / "config.yaml", "--logdir", tmp_path, "--name", "again")
    assert_refused(script("main.py", *again), "config.yaml: dataroot: ", "leads out of the working directory")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/..", "a/../..", "a/../../x", "{root}/x", "/", "x\0y", "~"])
@pytest.mark.parametrize("start", ["main.py", "evaluate.py"])
def test_a_run_lies_below_logdir(script, tmp_path, start, name):
    (tmp_path / "mine" / "logs" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "config.yaml").write_text("{}")  # as if it were a run
    before = names(tmp_path)
    flags = ("--overwrite", "--stop_epoch", 1) if start == "main.py" else ()
    words = ("--logdir", tmp_path / "mine" / "logs", "--name", name.format(root=tmp_path), *flags)
    assert_refused(script(start, *words, "--set", *TINY), "--name ", "names no directory below")
    assert names(tmp_path) == before


def test_a_name_may_have_parts():
    said = argparse.Namespace(logdir=Path("logs"), name="a/../b/c", load_conf=None)
    assert run_directory(said, Config()) == Path("logs/a/../b/c")
    said.name = None
    assert run_directory(said, Config(seed=3)) == Path("logs/demo_3")


@pytest.fixture
def theirs(tmp_path):
    """A model.pt for CIFAR-10 that says that data lie in a folder outside the working directory."""
    torch.manual_seed(0)
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    settings_said = plain_values(Config(dataset="cifar10", model="wresnet10_1", dataroot=str(tmp_path / "outside")))
    model = build_model("wresnet10_1", 10).state_dict()
    torch.save({"model": model, "classes": classes, "epoch": 1, "config": settings_said}, tmp_path / "model.pt")
    return ("evaluate.py", "--checkpoint", tmp_path / "model.pt")


@pytest.fixture
def public(tmp_path, monkeypatch):
    """CIFAR-10-C with an image of each severity, packed, at an address."""
    folder = tmp_path / "public" / "CIFAR-10-C"
    folder.mkdir(parents=True)
    for name in STANDARD:
        np.save(folder / f"{name}.npy", np.zeros((5, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.zeros(5, np.uint8))
    with tarfile.open(folder.with_suffix(".tar"), "w") as tar:
        tar.add(folder, "CIFAR-10-C")
    remote = Remote(folder.with_suffix(".tar").as_uri())
    monkeypatch.setitem(robustness.CIFAR10_C.keywords, "archive", remote)
    return folder


def test_nothing_is_put_where_only_a_checkpoint_says_so(script, theirs, public, tmp_path):
    for benchmark in ("cifar10-c", "clean", "cifar10.1-v4"):
        done = script(*theirs, "--benchmarks", benchmark, "--data-url", (tmp_path / "public").as_uri())
        assert_refused(done, f"{tmp_path / 'outside'}", "nothing is downloaded there", "with --dataroot DIR")
        assert_in_words(done.err.strip(), most=900)
    assert not (tmp_path / "outside").exists()


def test_what_lies_there_is_read_and_nothing_else_is_done_there(script, theirs, public, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    public.with_suffix(".tar").rename(outside / "CIFAR-10-C.tar")
    done = script(*theirs, "--benchmarks", "cifar10-c")
    assert_refused(done, "lacks CIFAR-10-C of CIFAR-10-C.tar; nothing is downloaded there")
    assert names(outside) == ["CIFAR-10-C.tar"]
    public.rename(outside / "CIFAR-10-C")
    before = names(outside)
    done = script(*theirs, "--benchmarks", "cifar10-c")
    assert done.status == 0, done.err
    assert names(outside) == before


def test_where_the_command_line_says_so_it_is_put(script, theirs, public, tmp_path):
    done = script(*theirs, "--benchmarks", "cifar10-c", "--dataroot", tmp_path / "outside")
    assert done.status == 0, done.err
    assert "CIFAR-10-C" in names(tmp_path / "outside")


# Images


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *, first=b"", last=b""):
    """A black picture, with chunks before or after it; of a high one the top."""
    rows = zlib.compress(bytes((1 + 3 * width) * min(height, 9)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + first + chunk(b"IDAT", rows) + last + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(1 << 24))
IMAGES = {
    "60000.png": (png(60_000, 60_000), "3600000000 pixels"),
    "12000.png": (png(12_000, 12_000), "144000000 pixels"),
    "strip.png": (png(2, 9000), "is too narrow: 2 by 9000 pixels"),
    "none.png": (png(0, 5), "cannot identify"),
    "text.png": (png(4, 4, first=chunk(b"zTXt", b"Comment\0\0" + BOMB)), "Decompressed data too large"),
    "itxt.png": (png(4, 4, first=chunk(b"iTXt", b"Comment\0\1\0\0\0" + BOMB)), "Decompressed data too large"),
    "colour.png": (png(4, 4, first=chunk(b"iCCP", b"x\0\0" + BOMB)), "Decompressed data too large"),
    "texts.png": (png(4, 4, first=chunk(b"tEXt", b"a\0" + bytes(10**6)) * 70), "Too much memory used in text chunks"),
    "large.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, *[0] * 6), "pixels"),
    "below.bmp": (b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, -5, 1, 24, *[0] * 6), "pixels"),
    "large.ppm": (b"P6 60000 60000 255\n", "pixels"),
    "number.ppm": (b"P3 2 2 255\n" + b"9" * 10_000, "Token too long"),
    "page.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "cannot identify"),
    "page.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "cannot identify"),
    "code.png": (pickle.dumps(os.system), "cannot identify"),
}
READERS = [FitSquare(8), RandomCrop(8, flip=True), CentreCrop(9, 8)]


def reasons_against(path):
    """What each way to read an image says against it, the quick look first."""
    return [FileCheck([path])[0], *(ImageFiles([path], read)[0, 0][2] for read in READERS)]


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A program that Pillow would have draw a page; the file that says that it ran."""
    (tmp_path / "bin").mkdir()
    program, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    program.write_text(f"#!/bin/sh\ntouch {shlex.quote(str(ran))}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    return ran


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_that_was_made_to_do_harm_is_unreadable_in_every_way(tmp_path, ghostscript, recwarn, name):
    content, words = IMAGES[name]
    path = tmp_path / name
    path.write_bytes(content)
    for reason in reasons_against(path):
        assert_in_words(reason, f"{path} (", words)
    assert not ghostscript.exists()
    assert not list(recwarn)


def test_a_bomb_behind_the_image_is_met_when_it_is_decoded(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(4, 4, last=chunk(b"zTXt", b"Comment\0\0" + BOMB)))
    assert all("Decompressed data too large" in reason for reason in reasons_against(path)[1:])


@pytest.mark.parametrize("kind", NO_FILE)
def test_what_is_no_image_file_is_not_waited_for(tmp_path, impatient, kind):
    path = tmp_path / "x.png"
    NO_FILE[kind](path)
    for reason in reasons_against(path):
        assert_in_words(reason, f"{path} (", "Errno" if "link" in kind else "is no file")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_that_was_cut_anywhere_is_unreadable_in_every_way(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((90, 70), Image.Resampling.BICUBIC).save(path)
    whole = path.read_bytes()
    assert reasons_against(path) == [None] * 4
    for part in range(20):
        path.write_bytes(whole[: part * (len(whole) - 30) // 19])
        for reason in reasons_against(path):
            assert_in_words(reason, f"{path} (")


def test_the_name_of_an_image_does_nothing_to_a_terminal(tmp_path):
    path = tmp_path / "a\n\x1b[31m.png"
    path.touch()
    for reason in reasons_against(path):
        assert_in_words(reason, r"a\n\x1b[31m.png (cannot identify")


@pytest.fixture
def tree(tmp_path):
    """Two classes, of whose images in training some were made to do harm, and two are as they should be."""
    for split, folder in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        place = tmp_path / "images" / split / folder
        place.mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(place / "fine.png")
    place = tmp_path / "images" / "train" / "a"
    for name, (content, _) in IMAGES.items():
        (place / name).write_bytes(content)
    os.mkfifo(place / "pipe.png")
    (place / "device.png").symlink_to("/dev/zero")
    (place / "folder.png").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_images_that_were_made_to_do_harm_are_named_or_left_out(tree, ghostscript, capsys, recwarn, dataset):
    of_tree = {"dataset": dataset, "dataroot": str(tree), "image_size": 8, "eval_view": (9, 8), "crop_padding": 0}
    message = refusal(load_data, Config(**of_tree, batch_size=2, workers=0), CPU)
    bad, there = len(IMAGES) + 2, len(IMAGES) + 4  # the pipe and the device as well
    assert_in_words(message, f"{bad} of {there} images cannot be read, first ", "skip_unreadable=true")
    data = load_data(Config(**of_tree, batch_size=2, workers=0, skip_unreadable=True), CPU)
    assert data.train.labels.tolist() == [0, 1]
    assert f"warning: skipped {bad} of {there} images, first " in capsys.readouterr().err
    assert not ghostscript.exists()
    assert not list(recwarn)


# Arrays


class Payload:
    """Calls a function when it is unpickled by who lets it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call

    def __call__(self):
        """What is called may come out of a pickle, too."""


def npy(shape="(5, 32, 32, 3)", descr="'|u1'", fortran="False", *, version=(1, 0), length=None, header=None, body=None):
    header = header or f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    header = header.ljust(117) + "\n"
    size = struct.pack("<H" if version == (1, 0) else "<I", len(header) if length is None else length)
    body = bytes(5 * 32 * 32 * 3) if body is None else body
    return b"\x93NUMPY" + bytes(version) + size + header.encode("latin1") + body


def saved(save, *arguments, **named):
    file = io.BytesIO()
    save(file, *arguments, **named)
    return file.getvalue()


def arrays(trace):
    evil = Payload(os.system, f"touch {shlex.quote(str(trace))}")
    code = f"open({str(trace)!r}, 'w')"
    return {
        "objects": saved(np.save, np.array([evil], dtype=object)),
        "an array of objects": npy(descr="'|O'", body=pickle.dumps(evil)),
        "objects in a record": npy(descr="[('a', '|O'), ('b', '|u1')]", body=pickle.dumps(evil)),
        "a pickle": pickle.dumps(evil),
        "a zip file": saved(np.savez, a=np.array([evil], dtype=object)),
        "a record": npy(descr="[('a\\n\\x1b[31m', '|u1')]"),
        "a long record": npy(descr=repr([(f"f{i}", "|u1") for i in range(400)]), body=bytes(10**7)),
        "code for a header": npy(header=code),
        "code for a shape": npy(f"({code},)"),
        "no dictionary": npy(header="[1]"),
        "no end": npy(header="(" * 9000),
        "signs": npy(header="-" * 9000 + "1"),
        "nothing in it": npy(header="{}"),
        "NUL": npy(header="{'descr'\0: 1}"),
        "a shape below zero": npy("(-5, 32, 32, 3)"),
        "two sides below zero": npy("(-5, -32, 32, 3)"),
        "a shape that overflows to zero": npy(f"({2**32}, {2**32}, 32, 3)"),
        "a shape that overflows": npy(f"({2**40}, {2**40}, 32, 3)"),
        "a shape beyond 64 bits": npy(f"({2**70}, 32, 32, 3)"),
        "a shape of many sides": npy("(" + "1, " * 3000 + ")"),
        "a shape of no numbers": npy("('a', 32, 32, 3)"),
        "a shape that is a number": npy("15360"),
        "more than there is": npy("(6, 32, 32, 3)"),
        "far more than there is": npy("(1000000000, 32, 32, 3)"),
        "column order": npy(fortran="True"),
        "an order that is no truth": npy(fortran="'no'"),
        "an unknown kind": npy(descr="'xyz'"),
        "huge items": npy(descr="'V2000000000'"),
        "another version": npy(version=(2, 0)),
        "no version": npy(version=(9, 9)),
        "a header of a GB": npy(version=(2, 0), length=1 << 30),
        "a header beyond the end": npy(length=65535),
        "cut": npy(body=bytes(99)),
        "magic alone": b"\x93NUMPY",
        "nothing": b"",
    }


@pytest.mark.parametrize("kind", arrays("trace"))
def test_an_array_that_was_made_to_do_harm_is_refused(tmp_path, recwarn, kind):
    path = tmp_path / "theirs.npy"
    path.write_bytes(npy())
    assert robustness._array(path, "images", lambda shape: True) == (5, 32, 32, 3)
    path.write_bytes(arrays(tmp_path / "trace")[kind])
    message = refusal(robustness._array, path, "images", lambda shape: True)
    assert_in_words(message, f"{path}: ")
    assert_in_words(refusal(robustness._labels, path, 5, 10), f"{path}: ")
    assert names(tmp_path) == ["theirs.npy"]
    assert not list(recwarn)


@pytest.mark.parametrize("kind", NO_FILE)
def test_what_is_no_array_file_is_not_waited_for(tmp_path, impatient, kind):
    path = tmp_path / "theirs.npy"
    NO_FILE[kind](path)
    words = "there is no such file" if kind == "link to nothing" else "cannot be read as an array ("
    assert_in_words(refusal(robustness._labels, path, 5, 10), f"{path}: {words}")


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150)
@given(st.sampled_from([npy(), npy("(5,)", body=bytes(5))]), EDITS)
def test_any_damage_to_an_array_is_read_or_refused(content, edits):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npy"
        path.write_bytes(edited(content[:140], edits) + content[140:])
        refusal(robustness._array, path, "images", lambda shape: True)
        refusal(robustness._labels, path, 5, 10)


# Checkpoints


def legacy_tar(evil):
    """The format of torch before 0.1.10: a tar archive of pickles."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(evil)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def packaged(code):
    file = io.BytesIO()
    with PackageExporter(file) as package:
        package.save_source_string("theirs", code)
        package.save_pickle("model", "data.pkl", {"a": 1})
    return file.getvalue()


def repacked(change, compression=zipfile.ZIP_STORED, more=(), content=None):
    """A file of torch.save whose entries went through change(name, content)."""
    content = saved_by_torch({"weight": torch.arange(6.0)}) if content is None else content
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(file, "w", compression) as after:
        for name in before.namelist():
            new = change(name.split("/", 1)[1], before.read(name))
            if new is not None:
                after.writestr(name, new)
        for name, new in more:
            after.writestr(name, new)
    return file.getvalue()


def saved_by_torch(content, **how):
    file = io.BytesIO()
    torch.save(content, file, **how)
    return file.getvalue()


def calls(trace):
    """What runs code when it is unpickled by who lets it; each would write `trace`."""
    command, code = f"touch {shlex.quote(str(trace))}", f"open({str(trace)!r}, 'w')"
    inner = saved_by_torch(Payload(os.system, command))
    return {
        "os.system": Payload(os.system, command),
        "exec": Payload(exec, code),
        "eval": Payload(eval, code),
        "open": Payload(open, str(trace), "w"),
        "a process": Payload(subprocess.check_call, ["touch", str(trace)]),
        "a method of a path": Payload(Path.touch, trace),
        "getattr": Payload(Payload(getattr, Payload(importlib.import_module, "os"), "system"), command),
        "torch.load": Payload(functools.partial(torch.load, weights_only=False), io.BytesIO(inner)),
        "torch's own bytes": Payload(torch.storage._load_from_bytes, inner),
    }


PACKED = {
    "in a zip file": lambda call: saved_by_torch({"model": call}),
    "in an older file": lambda call: saved_by_torch({"model": call}, _use_new_zipfile_serialization=False),
    "in a tar archive": legacy_tar,
    "in a pickle": lambda call: pickle.dumps({"model": call}, protocol=2),
}


def with_more(*entries):
    return repacked(lambda name, content: content, more=entries)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_checkpoint_that_would_run_code_is_not_run(tmp_path):
    path, trace = tmp_path / "theirs.pt", tmp_path / "trace"
    code, evil = f"open({str(trace)!r}, 'w')", pickle.dumps(calls(trace)["os.system"], protocol=2)
    files = {f"{name} {where}": pack(call) for name, call in calls(trace).items() for where, pack in PACKED.items()}
    files["a package"] = packaged(code)
    files["TorchScript"] = with_more(("archive/constants.pkl", evil), ("archive/code/__torch__.py", code.encode()))
    files["another pickle at the top"] = with_more(("data.pkl", evil))
    files["another pickle of that name"] = with_more(("archive/data.pkl", evil))
    files["names above"] = with_more(("../trace", b"x"), (str(trace), b"x"))
    for kind, content in files.items():
        path.write_bytes(content)
        assert refusal(load_tensors, path) is not None, kind
        assert names(tmp_path) == ["theirs.pt"], kind


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("where", PACKED)
def test_the_payloads_do_run_where_a_loader_lets_them(tmp_path, where):
    """Otherwise the test above would show nothing."""
    path, trace = tmp_path / "theirs.pt", tmp_path / "trace"
    for name, call in calls(trace).items():
        path.write_bytes(PACKED[where](call))
        with contextlib.suppress(Exception):
            pickle.loads(path.read_bytes()) if where == "in a pickle" else torch.load(path, weights_only=False)
        assert trace.exists(), name
        trace.unlink()


def claiming(size, of=b"data/0"):
    """A compressed file whose directory says that an entry has `size` bytes."""
    content = bytearray(repacked(lambda name, content: content, zipfile.ZIP_DEFLATED))
    at = content.index(b"PK\1\2")
    while content[at : at + 4] == b"PK\1\2":
        lengths = struct.unpack_from("<HHH", content, at + 28)
        if content[at + 46 : at + 46 + lengths[0]].endswith(of):
            struct.pack_into("<I", content, at + 24, size)
        at += 46 + sum(lengths)
    return bytes(content)


def with_count(count, *, storage, sizes):
    """The six numbers of the file's tensor given out as `count`: of the storage, or of the tensor's sizes, or both."""
    number = b"M" + struct.pack("<H", count)

    def change(name, content):
        if name != "data.pkl":
            return content
        parts = content.split(b"K\x06")
        assert len(parts) == 3, "the storage's, and the tensor's"
        return parts[0] + (number if storage else b"K\x06") + parts[1] + (number if sizes else b"K\x06") + parts[2]

    return repacked(change)


@pytest.mark.parametrize(
    "content",
    [
        with_count(1000, storage=True, sizes=True),
        with_count(1000, storage=False, sizes=True),
        repacked(lambda name, content: content[:8] if name == "data/0" else content),
        repacked(lambda name, content: b"" if name == "data/0" else content),
        repacked(lambda name, content: None if name == "data/0" else content),
        repacked(lambda name, content: None if name == "data.pkl" else content),
        repacked(lambda name, content: content[:-1] if name == "data.pkl" else content),
        repacked(lambda name, content: content.replace(b"FloatStorage", b"DoubleStorage")),
        repacked(lambda name, content: content.replace(b"K\0K\6\x85", b"K\1K\6\x85")),
        repacked(lambda name, content: content.replace(b"K\0K\6\x85", b"J\xff\xff\xff\xffK\6\x85")),
        repacked(lambda name, content: content.replace(b"K\1\x85", b"J\xff\xff\xff\xff\x85")),
        repacked(lambda name, content: b"middle" if name == "byteorder" else content),
        claiming(0xFFFFFFF0),
        claiming(0xFFFFFFF0, of=b"data.pkl"),
    ],
)
def test_tensors_beyond_their_numbers_are_refused(tmp_path, content):
    path = tmp_path / "theirs.pt"
    path.write_bytes(content)
    assert_in_words(refusal(load_tensors, path), "theirs.pt: cannot be read as a checkpoint (")


def test_a_folder_is_no_checkpoint(tmp_path):
    assert_in_words(refusal(load_tensors, tmp_path), f"{tmp_path}: cannot be read as a checkpoint (")


def small_model():
    content = {
        "model": {"weight": torch.arange(6.0), "count": torch.tensor(3), "half": torch.zeros(3, dtype=torch.bfloat16)},
        "classes": ["a", "b"],
        "epoch": 1,
        "config": {"lr": 0.1, "ops": ["Rotate", "Invert"], "train_size": None, "model": "wresnet10_1"},
    }
    return content


NEW, OLD = (saved_by_torch(small_model(), _use_new_zipfile_serialization=new) for new in (True, False))
MODEL = {"model": dict, "classes": [str], "config": dict, "epoch": int}  # as evaluate.py wants it


def read_as_evaluate_does(path):
    content = load_tensors(path)
    if has_shape(content, MODEL):
        load_config(None, {field: (str(path), value) for field, value in content["config"].items()})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("cheap_models")
@settings(max_examples=500)
@given(st.sampled_from(["file", "pickle", "pickle", "entries", "older file"]), EDITS, st.data())
def test_any_damage_to_a_checkpoint_is_read_or_refused(what, edits, data):
    """Bytes changed, left out, repeated, or from another file; in the entries of the zip file, too, with right CRCs."""

    def damaged(content, other):
        splice = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, len(other)))
        content = content[: splice[0]] + other[splice[1] :] if data.draw(st.integers(0, 9)) == 0 else content
        return edited(content, edits)

    if what == "file":
        content = damaged(NEW, OLD)
    elif what == "older file":
        content = damaged(OLD, NEW)
    elif what == "pickle":
        content = repacked(lambda n, c: damaged(c, OLD) if n == "data.pkl" else c, content=NEW)
    else:
        content = repacked(lambda n, c: c if n == "data.pkl" else edited(c, edits), content=NEW)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(content)
        refusal(read_as_evaluate_does, path)


KEYS_OF_CHECKPOINTS = mostly(FIELD, st.integers() | st.text(max_size=3))
VALUES_OF_CHECKPOINTS = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.integers(-(2**80), 2**80) | st.floats() | st.text(max_size=9)
    | st.binary(max_size=9)
    | st.sampled_from(["cifar10", "Rotate", "/outside", torch.zeros(3), torch.Size([3]), torch.float16, CPU])
    | st.integers(1, 20_000).map(lambda bits: 1 << bits),
    lambda items: st.lists(items, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), items, max_size=3)
    | st.tuples(items) | st.sets(st.integers(), max_size=2),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=200)
@given(st.dictionaries(KEYS_OF_CHECKPOINTS, VALUES_OF_CHECKPOINTS, max_size=3))
@pytest.mark.usefixtures("cheap_models")
def test_any_settings_of_a_checkpoint_are_read_or_refused(said):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save(small_model() | {"config": said}, path)
        refusal(read_as_evaluate_does, path)


# Archives; test_download.py has more of them


@pytest.mark.parametrize("kind", MALICIOUS)
def test_a_malicious_archive_leaves_no_trace_however_it_is_packed(tmp_path, kind):
    """Of a name that says gzip, and packed by xz: what it is, is told by its content."""
    members = [(name.format(root=tmp_path), *what) for name, *what in MALICIOUS[kind]]
    plain = pack(tmp_path / "bad.tar", ("fine", b"x"), *members)
    archive = tmp_path / "bad.tgz"
    archive.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()
    with pytest.raises(UserError, match="do not trust it"):
        unpack(archive, tmp_path / "data")
    assert names(tmp_path) == ["bad.tgz", "data"]


def tar_of(path, *members, **how):
    with tarfile.open(path, "w", **how) as tar:
        for name, attributes in members:
            member = tarfile.TarInfo(name)
            for attribute, value in attributes.items():
                setattr(member, attribute, value)
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
HEADERS = {
    "another path": {"path": "../outside"},
    "another path, absolute": {"path": "{root}/outside"},
    "a path with NUL": {"path": "x\0/../../outside"},
    "a path of nothing": {"path": ""},
    "another path, sparse": SPARSE | {"GNU.sparse.name": "../outside"},
    "sparse": SPARSE | {"GNU.sparse.name": "outside"},
    "sparse, of an older kind": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"},
    "a size below zero": {"size": "-512"},
    "a size beyond all": {"size": "9" * 30},
    "a size of no number": {"size": "x"},
}


@pytest.mark.parametrize("everywhere", [False, True], ids=["of a file", "of the archive"])
@pytest.mark.parametrize("kind", HEADERS)
def test_headers_that_say_something_else_than_the_file_leave_no_trace(tmp_path, kind, everywhere):
    headers = {key: value.format(root=tmp_path) for key, value in HEADERS[kind].items()}
    own, of_all = ({}, headers) if everywhere else (headers, {})
    bad = ("inside", {"pax_headers": own, "size": 0 if "size" in kind else 512})
    archive = tar_of(tmp_path / "bad.tar", bad, pax_headers=of_all)
    with contextlib.suppress(UserError):
        unpack(archive, tmp_path / "data")
    assert [name for name in names(tmp_path) if not name.startswith("data/")] == ["bad.tar", "data"]
    assert set(names(tmp_path / "data")) <= {"inside"}


@pytest.mark.parametrize("name", ["../" + "x" * 200, "/" + "x" * 200, "a/" * 80 + "../" * 90 + "x", "", "x" * 5000])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length_leave_no_trace(tmp_path, name, form):
    archive = tar_of(tmp_path / "bad.tar", ("fine", {}), (name, {"size": 9}), format=form)
    with pytest.raises(UserError) as error:
        unpack(archive, tmp_path / "data")
    assert re.search("do not trust it|cannot be unpacked there", str(error.value))
    assert names(tmp_path) == ["bad.tar", "data"]


@pytest.mark.parametrize("kind", [b"Z", b"V", b"M", b"D", tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_members_of_an_unknown_kind_leave_no_trace(tmp_path, kind):
    member = ("theirs", {"type": kind, "linkname": "/etc/passwd"})
    archive = tar_of(tmp_path / "bad.tar", ("fine", {}), member)
    message = refusal(unpack, archive, tmp_path / "data")
    assert message is not None
    assert names(tmp_path) == ["bad.tar", "data"]
