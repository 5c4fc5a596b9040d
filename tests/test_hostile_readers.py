"""Readers of what may be somebody else's: weights, headers of archives, manifests, results, links, names."""

import os

import pytest
import torch
from conftest import assert_refused
from test_hostile import PACKED, assert_in_words, calls, refusal, repacked, saved_by_torch

from config import Config, plain_values
from datasets.loading import load_data
from evaluation.generated import read_manifest
from evaluation.results import read_results
from models import build_model
from utils import load_tensors


def model_pt(path, **other):
    config = plain_values(Config(dataset="shapes", model="wresnet10_1"))
    content = {"model": build_model("wresnet10_1", 10).state_dict(), "classes": list("abcdefghij"), "epoch": 1}
    torch.save(content | {"config": config} | other, path)
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: {"stem.weight": 3},
        lambda weights: {"stem.weight": [1, 2]},
        lambda weights: {3: torch.zeros(3)},
        lambda weights: weights | {"classifier.weight": torch.zeros(10, 64).to_sparse()},
        lambda weights: weights | {"classifier.weight": torch.zeros(10, 64, device="meta")},
        lambda weights: weights | {"classifier.weight": torch.zeros(10, 64, dtype=torch.complex64)},
        lambda weights: weights | {"x" * 10**5: torch.zeros(1)},
        lambda weights: weights | {"x\n\x1b[31m": torch.zeros(1)},
    ],
)
@pytest.mark.parametrize("as_weights", [False, True])
def test_weights_that_are_none(script, tmp_path, change, as_weights):
    weights = change(build_model("wresnet10_1", 10).state_dict())
    path = tmp_path / "model.pt"
    if as_weights:
        torch.save(weights, path)
        what = ("--model", "wresnet10_1", "--weights", path, "--set", "dataset=shapes")
    else:
        what = ("--checkpoint", model_pt(path, model=weights))
    done = script("evaluate.py", *what)
    assert_refused(done, f"{path}: ")
    assert_in_words(done.err.strip())


def test_a_network_that_does_not_fit_is_not_built(script, tmp_path):
    """The settings say one of 1.5 TB."""
    config = plain_values(Config(dataset="shapes", model="wresnet28_1000"))
    done = script("evaluate.py", "--checkpoint", model_pt(tmp_path / "model.pt", config=config))
    assert_refused(done, "does not fit wresnet28_1000")


@pytest.mark.parametrize("epoch", [-1, 1 << 20000], ids=["below zero", "huge"])
def test_an_epoch_that_is_none(script, tmp_path, epoch):
    assert_refused(script("evaluate.py", "--checkpoint", model_pt(tmp_path / "model.pt", epoch=epoch)), "model.pt")


@pytest.mark.parametrize("classes", [["x" * 10**5] * 10, ["\n\x1b[31m"] * 10, []], ids=["long", "odd", "none"])
def test_classes_that_are_none(script, tmp_path, classes):
    done = script("evaluate.py", "--checkpoint", model_pt(tmp_path / "model.pt", classes=classes))
    assert done.status == 2
    assert_in_words(done.err.strip())


@pytest.mark.parametrize("where", PACKED)
def test_nobody_is_told_to_run_the_code_in_a_checkpoint(tmp_path, where, recwarn):
    path = tmp_path / "a.pt"
    path.write_bytes(PACKED[where](calls(tmp_path / "trace")["os.system"]))
    message = refusal(load_tensors, path)
    assert "weights_only" not in message, message
    assert "trust" not in message or "do not trust" in message, message
    assert not [w for w in recwarn if w.category is UserWarning]


def test_a_torchscript_file_is_no_warning(tmp_path, recwarn):
    (tmp_path / "a.pt").write_bytes(repacked(lambda n, c: c, more=[("archive/constants.pkl", b"x")]))
    assert refusal(load_tensors, tmp_path / "a.pt")
    assert not list(recwarn)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_checkpoint_that_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.pt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    assert refusal(load_tensors, path)


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    import zipfile

    path, zeros = tmp_path / "a.pt", {"weight": torch.zeros(10**7)}
    path.write_bytes(repacked(lambda n, c: c, zipfile.ZIP_DEFLATED, content=saved_by_torch(zeros)))
    assert path.stat().st_size < 10**5
    assert refusal(load_tensors, path)
    torch.save(zeros, path)
    assert torch.equal(load_tensors(path)["weight"], zeros["weight"])
    torch.save(zeros, path, _use_new_zipfile_serialization=False)
    assert torch.equal(load_tensors(path)["weight"], zeros["weight"])


def test_a_link_that_leads_to_itself_is_unreadable_or_passed_over(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
    (tmp_path / "train" / "a" / "x.png").symlink_to("x.png")
    config = Config(dataset="folder", dataroot=str(tmp_path), crop_padding=0, workers=0, skip_unreadable=True)
    assert refusal(load_data, config, torch.device("cpu"))


DEEP = "[" * 100_000


def test_deep_json_is_damage(tmp_path):
    (tmp_path / "results.json").write_text(DEEP)
    assert refusal(read_results, tmp_path / "results.json")
    (tmp_path / "generated.json").write_text(DEEP)
    assert refusal(read_manifest, tmp_path)


def test_a_name_in_a_message_does_nothing_to_a_terminal(script, tmp_path):
    for name in ("0\x1b[31m", "a"):
        (tmp_path / "train" / name).mkdir(parents=True)
    done = script("main.py", "--dataroot", tmp_path, "--logdir", tmp_path / "logs", "--set", "dataset=folder")
    assert done.status == 2
    assert_in_words(done.err.strip())


def test_a_depth_that_takes_a_while(recwarn):
    import time

    started = time.process_time()
    for model in ("wresnet9994_1", "shakeshake9998_2x32d", "pyramid9992_1"):
        with pytest.raises(Exception, match="depth"):
            Config(model=model)
    assert time.process_time() - started < 10
