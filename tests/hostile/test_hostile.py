"""Damaged and hostile text files, archives and names: refused in one or two lines, nothing executed or written."""

import argparse
import contextlib
import io
import json
import os
import string
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY, assert_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from payloads import EDITS, NO_FILE, assert_in_words, edited, names, no_endless_read, refusal  # noqa: F401

import config
from config import LONGEST_CONF, Config, load_config, overrides_from, plain_values
from datasets.download import unpack
from evaluation.corruptions import STANDARD
from evaluation.generated import read_manifest
from evaluation.results import read_results
from models import build_model
from policies.recorded import read_policies
from utils import UserError, short_repr

FIELDS = list(Config.__dataclass_fields__)

# Confs


@pytest.fixture
def conf(tmp_path):
    def write(content):
        path = tmp_path / "conf.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def laughs(kind, depth=30):
    """Thirty lines that stand for 10^30 items: each holds the one before ten times."""
    lines = [f"a{i}: &a{i} {kind.format(','.join([f'*a{i - 1}'] * 10))}" for i in range(1, depth)]
    return "\n".join(["a0: &a0 {x: 1, y: 2}", *lines])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (laughs("[{}]") + "\nlr: *a29", "'a0'"),
        (laughs("{{<<: [{}]}}"), "line 2"),
        ("lr: &a [*a]", "lr: [[[...]]]"),
        ("? &a {*a : 1}\n: 1", "line 1"),
        ("lr: 0x" + "F" * 5000, "lr: <20000 bits>"),
        ("image_size: 0x" + "F" * 60000, "image_size: <240000 bits>"),
        ("policy: " + "x" * 60000, "policy: 'xxx"),
        ("model: wresnet" + "9" * 5000 + "_1", "model"),
        ("? " + "x" * 60000 + "\n: 1", "'xxx"),
        ("lr: !!" + "x" * 60000 + " 1", "line 1"),
        ('policy: "a\\n\\e[31m\\0"', r"policy: 'a\n\x1b[31m\x00'"),
        ('"l\\nr": 1', r"'l\nr'"),
        ('ops: ["\\e[2J"]', r"'\x1b[2J'"),
        ('dataroot: "a\\0b"', r"dataroot: 'a\x00b'"),
        ('dataroot: "\\ud800"', r"dataroot: '\ud800'"),
        ("lr: !!python/object/apply:os.system ['touch trace']", "YAML"),
        ("lr: !!python/name:os.system", "YAML"),
        ("!!python/object/new:os.system ['touch trace']", "YAML"),
        ("{a: " * 3000, "YAML"),
        ("lr: !!binary " + "A" * 60000, r"lr: b'\x00\x00"),
        ("? [a, b]\n: 1", "line 1"),
        (".nan: 1", "nan"),
        ("lr: 1.0e+400", "lr: inf"),
        ("mean: [.nan, 0, 0]", "mean: (nan, 0.0, 0.0)"),
        ("lr: 1\nM: 2\n'lr': 3", "line 3: 'lr'"),
        ("lr: 1\n---\nlr: 2", "YAML"),
        (b"lr: 1\0", "YAML"),
        ("#" * LONGEST_CONF + "\n", f"{LONGEST_CONF} bytes"),
        ("model: wresnet28_999999", "width"),
        ("model: wresnet9994_1", "depth"),
        ("model: shakeshake26_2x99999999d", "width"),
        ("model: pyramid272_99999999", "alpha"),
        ("model: resnet99999999", "depth"),
    ],
)  # fmt: skip
def test_hostile_confs_are_refused(conf, tmp_path, monkeypatch, content, word):
    monkeypatch.chdir(tmp_path)
    path = conf(content)
    message = refusal(load_config, path, {})
    assert message is not None
    assert message.startswith(str(path))
    assert word in message
    assert names(tmp_path) == ["conf.yaml"]


@pytest.mark.parametrize("name", ["wresnet28_1000", "shakeshake26_2x10000d", "pyramid272_10000"])
def test_huge_networks_are_checked_without_their_memory(conf, name):
    assert load_config(conf(f"model: {name}"), {}).model == name


def quoted(text):
    return json.dumps(text)  # whose escapes are YAML's


SCALARS = st.one_of(
    st.integers(-3, 300).map(str),
    st.integers(-(10**12), 10**12).map(str),
    st.integers(1, 20_000).map(lambda digits: "0x" + "F" * digits),
    st.floats(width=32).map(str),
    st.text(max_size=20).map(quoted),
    st.sampled_from([
        "~", "true", "no", ".inf", "-.inf", ".nan", "1.0e+400", "5e-4", "0o17", "1_000", "1:30:00", "2001-01-01",
        "!!binary aGk=", "!!str 1", "!!float 1", "!!null x", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1, a: 2]",
        "&b [*b]", "&c {x: *c}", "*a", '"\\ud800"', '"\\0"', "cifar10", "imagenet", "folder", "step", "cosine",
        "random", "none", "Rotate", "[Rotate, Invert]", "../x", "/x", "wresnet28_99999", "shakeshake26_2x31d",
        "resnet50d", "resnet51", "!!python/object/apply:os.system ['touch TRACE']", "!!python/tuple [1]", "!!int x",
        "!!timestamp x", "2001-13-45", "! x", "=", "<<", "{<<: *a}", "|\n  x\n  y", "# x", "'", "*d",
    ]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda items: st.one_of(
        st.lists(items, max_size=4).map(lambda of: f"[{', '.join(of)}]"),
        st.lists(st.tuples(items, items), max_size=3).map(lambda of: f"{{{', '.join(f'{k}: {v}' for k, v in of)}}}"),
        st.tuples(st.sampled_from([2, 9, 99]), items).map(lambda of: "[" * of[0] + of[1] + "]" * of[0]),
    ),
    max_leaves=6,
)
KEYS = st.sampled_from([*FIELDS * 4, "lrr", "<<", "? x\n", "- ", "'lr'", "!!str lr"])
PAIRS = st.tuples(KEYS, SCALARS | VALUES)


def write_and_read(content, name, read):
    """Whether anything was executed shows in the file that TRACE is replaced by."""
    with tempfile.TemporaryDirectory() as folder:
        trace, path = Path(folder) / "trace", Path(folder) / name
        path.write_bytes(content.replace(b"TRACE", bytes(trace)))
        refusal(read, path)
        assert not trace.exists()


def read_conf(path):
    load_config(path, {})


@settings(max_examples=150)
@given(
    st.binary(max_size=400)
    | st.lists(PAIRS, max_size=4, unique_by=lambda pair: pair[0]).map(
        lambda pairs: "\n".join(map(": ".join, pairs)).encode("utf-8", "surrogatepass")
    )
)
def test_random_confs_are_read_or_refused(content):
    write_and_read(content, "a.yaml", read_conf)


CONFS = [path.read_bytes() for path in sorted((ROOT / "confs").glob("*.yaml"))]
# All settings, as in a run's config.yaml; and without comments, so that every edit counts.
PLAIN_CONFS = [config.to_yaml(Config()).encode(), *(yaml.safe_dump(yaml.safe_load(text)).encode() for text in CONFS)]


@settings(max_examples=100)
@given(st.sampled_from(PLAIN_CONFS), EDITS)
def test_damaged_confs_are_read_or_refused(content, edits):
    write_and_read(edited(content, edits), "a.yaml", read_conf)


@settings(max_examples=100)
@given(st.lists(PAIRS.map("=".join) | st.text(string.printable, max_size=30), max_size=3))
def test_random_overrides_are_read_or_refused(words):
    args = argparse.Namespace(set=words, load_conf=None)
    refusal(lambda: load_config(None, overrides_from(args)))


def test_values_of_any_type_are_shown_shortly():
    """The settings in a checkpoint are read by the same reader, and hold what pickles hold."""
    tensor = torch.nn.Parameter(torch.zeros(3))
    deep = {"a": 1}
    for _ in range(40):
        deep = {"a": deep, "b": deep, "c": deep}
    for value in (tensor, deep, torch.zeros(()).expand(10**15), {tensor: deep}, {1: [deep] * 9}, 1j, bytearray(10**6)):
        assert_in_words(refusal(load_config, None, {"lr": ("a.pt", value)}), "a.pt: lr: ", most=250)
        assert len(short_repr(value)) <= 160
    assert_in_words(refusal(load_config, None, {tensor: ("a.pt", 1)}), "a.pt", "<Parameter>")


# Files of policies, results and manifests

DEEP = b"[" * 5_000
POLICIES = [[[["Rotate", 3], ["Invert", 0]], [["Solarize", 2]]]] * 2
CELL = {"part": "", "severity": None, "images": 10, "error": 0.5, "loss": 1.0, "calibration_error": 0.1, "top1": 0.5}
CELL |= {"class_images": [5, 5], "class_correct": [2, 3]}
CLEAN = {"kind": "test set", "source": "own", "checked_by": "decoding", "note": "", "fingerprint": "f"}
CLEAN |= {"environment": {}, "cells": [CELL], "summary": {"error": 0.5}}
RESULTS = {"checkpoint": "c", "sha256": "s", "model": "m", "epoch": 1, "precision": "float32"}
RESULTS |= {"scored_with": {"dataset": "shapes"}, "config": {"lr": 0.1}, "benchmarks": {"clean": CLEAN}}
GENERATED = {"test_set": "f", "classes": ["a", "b"], "side": 32, "files": {"fog.npy": "s"}}


def as_json(content):
    return json.dumps(content).encode()


# By the file's name: its reader, and content that it accepts.
READERS = {
    "policies.json": (read_policies, as_json({"policies": POLICIES})),
    "policies.yaml": (read_policies, yaml.safe_dump({"policies": POLICIES, "levels": 10}).encode()),
    "policies.jsonl": (read_policies, as_json({"policies": POLICIES}) + b"\n" + as_json({"policies": POLICIES})),
    "results.json": (read_results, as_json(RESULTS)),
    "generated.json": (lambda path: read_manifest(path.parent), as_json(GENERATED)),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"3", b"null", b"\xff", DEEP, b'{"policies": "\\u001b[31m"}', b"[NaN]", b"9" * 9999]
)
def test_damaged_files_of_values_are_refused(tmp_path, name, content):
    read, accepted = READERS[name]
    (tmp_path / name).write_bytes(accepted)
    assert refusal(read, tmp_path / name) is None
    (tmp_path / name).write_bytes(content)
    assert_in_words(refusal(read, tmp_path / name), str(tmp_path / name))


@settings(max_examples=100)
@given(st.sampled_from(sorted(READERS)), EDITS)
def test_random_damage_to_values_is_read_or_refused(name, edits):
    read, accepted = READERS[name]
    write_and_read(edited(accepted, edits), name, read)


@pytest.mark.parametrize("kind", NO_FILE)
@pytest.mark.parametrize("read", [read_conf, read_policies], ids=["conf", "policies"])
@pytest.mark.usefixtures("no_endless_read")
def test_text_that_is_not_in_a_file_is_refused(tmp_path, kind, read):
    path = tmp_path / "a.yaml"
    NO_FILE[kind](path)
    if not (kind == "folder" and read is read_policies):  # a run's directory, without policies.jsonl
        assert_in_words(refusal(read, path), str(path))


# Archives; tests/datasets/test_download.py has more of them


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
    "another path, sparse": SPARSE | {"GNU.sparse.name": "../outside"},
    "sparse, older": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9", "GNU.sparse.numblocks": "1"},
    "negative size": {"size": "-512"},
    "huge size": {"size": "9" * 30},
}


@pytest.mark.parametrize("everywhere", [False, True], ids=["of a file", "of the archive"])
@pytest.mark.parametrize("kind", HEADERS)
def test_contradicting_headers_write_nothing_outside(tmp_path, kind, everywhere):
    headers = {key: value.format(root=tmp_path) for key, value in HEADERS[kind].items()}
    of_file, of_archive = ({}, headers) if everywhere else (headers, {})
    bad = ("inside", {"pax_headers": of_file, "size": 0 if "size" in kind else 512})
    archive = tar_of(tmp_path / "bad.tar", bad, pax_headers=of_archive)
    with contextlib.suppress(UserError):
        unpack(archive, tmp_path / "data")
    assert [name for name in names(tmp_path) if not name.startswith("data/")] == ["bad.tar", "data"]
    assert set(names(tmp_path / "data")) <= {"inside"}


@pytest.mark.parametrize(
    "member",
    [
        *((name, {"size": 9}) for name in ("../" + "x" * 200, "/" + "x" * 200, "a/" * 80 + "../" * 90, "x" * 300)),
        *(("a", {"type": kind, "linkname": "/etc/passwd"}) for kind in (b"Z", b"V", tarfile.LNKTYPE, tarfile.SYMTYPE)),
    ],
    ids=lambda member: f"{member[0][:6]}-{member[1].get('type')}",
)  # fmt: skip
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["GNU", "PAX"])
def test_hostile_members_of_archives_are_refused(tmp_path, member, form):
    archive = tar_of(tmp_path / "bad.tar", ("fine", {}), member, format=form)
    assert refusal(unpack, archive, tmp_path / "data")
    assert names(tmp_path) == ["bad.tar", "data"]


# Names and places


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/../..", "{root}/x", "/", "x\0y"])
@pytest.mark.parametrize("start", ["main.py", "evaluate.py"])
def test_a_run_stays_below_logdir(script, tmp_path, start, name):
    (tmp_path / "mine" / "logs" / "a").mkdir(parents=True)
    (tmp_path / "mine" / "config.yaml").write_text("{}")  # as in a run's directory
    before = names(tmp_path)
    flags = ("--overwrite", "--stop_epoch", 1) if start == "main.py" else ()
    words = ("--logdir", tmp_path / "mine" / "logs", "--name", name.format(root=tmp_path), *flags)
    assert_refused(script(start, *words, "--set", *TINY), "--name ")
    assert names(tmp_path) == before


@pytest.fixture
def score_outside(script, tmp_path):
    """Score a model.pt for CIFAR-10 that says that the data are in a folder outside the working directory."""
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    own = plain_values(Config(dataset="cifar10", model="wresnet10_1", dataroot=str(tmp_path / "outside")))
    model = build_model("wresnet10_1", 10).state_dict()
    torch.save({"model": model, "classes": classes, "epoch": 1, "config": own}, tmp_path / "model.pt")
    return lambda *words: script("evaluate.py", "--checkpoint", tmp_path / "model.pt", "--benchmarks", *words)


@pytest.mark.parametrize("benchmark", ["cifar10-c", "clean", "cifar10.1-v4"])
def test_a_checkpoint_cannot_choose_where_data_are_put(score_outside, tmp_path, benchmark):
    (tmp_path / "mirror").mkdir()
    done = score_outside(benchmark, "--data-url", (tmp_path / "mirror").as_uri())
    assert_refused(done, str(tmp_path / "outside"), "--dataroot DIR")
    assert_in_words(done.err.strip(), most=900)
    assert not (tmp_path / "outside").exists()


def test_where_a_checkpoint_says_data_are_only_read(score_outside, tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "outside" / "CIFAR-10-C"
    outside.mkdir()
    tar_of(outside / "CIFAR-10-C.tar", ("CIFAR-10-C", {"type": tarfile.DIRTYPE}))
    assert_refused(score_outside("cifar10-c"), "CIFAR-10-C", "--dataroot DIR")
    assert names(outside) == ["CIFAR-10-C.tar"]
    folder.mkdir()
    for name in STANDARD:
        np.save(folder / f"{name}.npy", np.zeros((5, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.zeros(5, np.uint8))
    before = names(outside)
    done = score_outside("cifar10-c")
    assert done.status == 0, done.err
    assert names(outside) == before


def test_a_name_in_a_message_does_nothing_to_a_terminal(script, tmp_path):
    for name in ("0\x1b[31m", "a"):
        (tmp_path / "train" / name).mkdir(parents=True)
    done = script("main.py", "--dataroot", tmp_path, "--logdir", tmp_path / "logs", "--set", "dataset=folder")
    assert_refused(done)
    assert_in_words(done.err.strip())
    assert os.listdir(tmp_path) == ["train"]
