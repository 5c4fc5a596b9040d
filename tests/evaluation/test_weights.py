"""Weights as other programs save them: what is scored, what is told, and what is refused with its remedy."""

import argparse
import bz2
import gzip
import io
import json
import lzma
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import assert_refused
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

import evaluate
from evaluation.weights import load_classifiers
from models import build_model


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = build_model("wresnet10_1", 10)
    model(torch.randn(4, 3, 32, 32))  # moves BatchNorm's statistics
    return model.eval()


@pytest.fixture
def load(monkeypatch, tmp_path):
    """The classifier of a file: load(content or path, words of the command line)."""

    def run(content, *words):
        file = content
        if isinstance(content, dict):
            torch.save(content, file := tmp_path / "theirs.pth")
        words = ("--model", "wresnet10_1", "--weights", file, "--set", "dataset=shapes", *words)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        (classifier,) = load_classifiers(evaluate.parse_arguments())
        return classifier

    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32))


def prefixed(weights, prefix):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def zipped(name):
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(name, b"weights")
        return file.getvalue()


WRAPPED = {
    "net": lambda w: {"net": w, "acc": 93.1, "epoch": 3},
    "module": lambda w: {"module": w},
    "params": lambda w: {"params": w},
    "unusual name": lambda w: {"hello": w, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
    "nested": lambda w: {"model": {"state_dict": w}},
    "Lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.0"},
    "two prefixes": lambda w: prefixed(w, "learner.backbone."),
    "DDP": lambda w: prefixed(w, "module."),
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "compiled parts": lambda w: {name.replace("groups.", "groups._orig_mod."): value for name, value in w.items()},
    "thop": lambda w: {**w, "total_ops": torch.zeros(1), "stem.total_params": torch.zeros(1)},
    "old torch": lambda w: {name: value for name, value in w.items() if "num_batches_tracked" not in name},
    "old counters": lambda w: {n: v.view(1) if "num_batches" in n else v for n, v in w.items()},
    "half precision": lambda w: {n: v.half() if v.is_floating_point() else v for n, v in w.items()},
    "with our controller": lambda w: {"model": w, "controller": {"op_head.bias": torch.zeros(16)}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_that_are_plainly_the_same_are_taken(load, network, wrap, capsys):
    wrapped = wrap(network.state_dict())
    built = load(wrapped).build()
    expected = build_model("wresnet10_1", 10)
    plain = wrap(network.state_dict()) if wrap is WRAPPED["half precision"] else network.state_dict()
    expected.load_state_dict(plain, strict=True)
    assert torch.equal(logits(built), logits(expected))
    assert capsys.readouterr().err == ""


def test_an_averaged_model_of_torch_is_taken(load, network):
    averaged = AveragedModel(network)
    averaged.update_parameters(network)
    assert torch.equal(logits(load(averaged.state_dict()).build()), logits(network))


def test_safetensors_are_read(load, network, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, file)
    assert torch.equal(logits(load(file).build()), logits(network))
    for content in (file.read_bytes()[:-10], b"\xff" * 7 + b'\x7f{"'):
        file.write_bytes(content)
        with pytest.raises(evaluate.UserError, match=r"model\.safetensors: cannot be read as safetensors \("):
            load(file)


def test_without_the_package_safetensors_are_named_with_the_remedy(load, tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b'{"')
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(evaluate.UserError, match=r"needs the package safetensors; run: pip install safetensors$"):
        load(tmp_path / "model.safetensors")


class Normalising(nn.Module):
    """As robustness benchmarks wrap networks: inputs in 0..1, and the normalisation is a layer."""

    def __init__(self, model):
        super().__init__()
        self.register_buffer("mu", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("sigma", torch.tensor([0.2, 0.25, 0.5]).view(1, 3, 1, 1))
        self.model = model


def test_a_normalisation_inside_the_weights_is_used_and_told(load, network, capsys):
    wrapped = {"0.mean": torch.zeros(3), "0.std": torch.ones(3), **prefixed(network.state_dict(), "1.")}
    for content, mean, std in (
        (wrapped, (0, 0, 0), (1, 1, 1)),
        (Normalising(network).state_dict(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)),
    ):
        classifier = load(content)
        assert torch.equal(logits(classifier.build()), logits(network))
        assert (classifier.config.mean, classifier.config.std) == (pytest.approx(mean), pytest.approx(std))
        assert f"its own normalisation is used, mean {[float(v) for v in mean]} and std" in capsys.readouterr().err
    ours = load(wrapped, "mean=[0.1,0.2,0.3]").config
    assert (ours.mean, ours.std) == ((0.1, 0.2, 0.3), (1, 1, 1))


def test_of_raw_and_averaged_weights_one_is_scored_and_told(load, network, capsys):
    other = {name: torch.zeros_like(value) for name, value in network.state_dict().items()}
    both = {"state_dict_ema": other, "state_dict": network.state_dict()}
    assert torch.equal(logits(load(both).build()), logits(network))
    told = "the weights of 'state_dict' are scored, those of 'state_dict_ema' with --ema"
    assert told in capsys.readouterr().err
    assert not logits(load(both, "--ema").build()).any()
    assert "the weights of 'state_dict_ema' are scored, those of 'state_dict' without --ema" in capsys.readouterr().err
    assert torch.equal(logits(load({"model_ema": network.state_dict()}).build()), logits(network)), "the only one"
    with pytest.raises(evaluate.UserError, match=r"--ema: .* holds no averaged weights, only 'schema'"):
        load({"schema": other}, "--ema")
    with pytest.raises(evaluate.UserError, match=r"holds several state dicts \('one', 'two'\)"):
        load({"one": other, "two": other})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the file itself"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page; download the file itself"),
        (gzip.compress(b"weights"), "is compressed by gzip; unpack it with gunzip"),
        (bz2.compress(b"weights"), "is compressed by bzip2"),
        (lzma.compress(b"weights"), "is compressed by xz"),
        (zipped("weights.pth"), "it is a zip archive of other files; unpack it"),
        (b"", "is empty"),
        (pickle.dumps({"a": 1}), "damaged, or holds more than tensors"),
    ],
    ids=["pointer", "page", "gzip", "bzip2", "xz", "zip", "empty", "pickle"],
)
def test_files_that_are_no_checkpoints_are_named(load, tmp_path, content, words):
    (tmp_path / "theirs.pth").write_bytes(content)
    with pytest.raises(evaluate.UserError, match=f"theirs.pth: .*{words}"):
        load(tmp_path / "theirs.pth")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of TorchScript
@pytest.mark.parametrize("kind", ["Namespace", "numpy scalar", "module", "TorchScript"])
def test_what_could_run_code_is_named_with_the_remedy(load, network, tmp_path, kind):
    file, weights = tmp_path / "theirs.pth", network.state_dict()
    if kind == "TorchScript":
        torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 32, 32)), file)
    else:
        extra = {"Namespace": argparse.Namespace(lr=0.1), "numpy scalar": np.float64(1), "module": network}[kind]
        torch.save(network if kind == "module" else {"state_dict": weights, "extra": extra}, file)
    named = {
        "Namespace": "argparse.Namespace",
        "numpy scalar": "numpy",
        "module": "models.wideresnet.WideResNet",
        "TorchScript": "a TorchScript program",
    }
    with pytest.raises(evaluate.UserError) as error:
        load(file)
    first, second = str(error.value).splitlines()
    assert f"it holds {named[kind]}" in first
    assert "save the weights alone where it was made: torch.save(model.state_dict(), FILE)" in second


# ImageNet's classes


@pytest.fixture
def imagenette(tmp_path):
    """Three of ImageNet's class folders, and weights of 1,000 outputs that call everything an English springer."""
    for name in ("n01440764", "n02102040", "n03888257"):
        for i in range(10):
            path = tmp_path / "data" / "val" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (20 * i, 0, 0)).save(path)
    model = build_model("wresnet10_1", 1000)
    nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data[217] = 5
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    return tmp_path


def score(script, root, *words):
    settings = ("--set", "dataset=folder", "image_size=32", "workers=0", *words)
    named = ("--model", "wresnet10_1", "--weights", root / "theirs.pth", "--dataroot", root / "data")
    return script("evaluate.py", *named, *settings)


def test_a_part_of_imagenet_is_scored_by_all_its_outputs(script, imagenette):
    done = score(script, imagenette)
    assert done.status == 0, done.err
    (cell,) = json.loads((imagenette / "theirs.pth.results.json").read_text())["benchmarks"]["clean"]["cells"]
    assert (cell["images"], cell["correct"]) == (30, 10)
    assert {place: count for place, count in enumerate(cell["class_correct"]) if count} == {217: 10}
    assert {place for place, count in enumerate(cell["class_images"]) if count} == {0, 217, 701}
    assert "n02102040" in done.out
    assert "chance" not in done.err


def test_an_accuracy_far_below_chance_gets_a_hint(script, imagenette):
    for image in (imagenette / "data" / "val" / "n02102040").iterdir():
        image.unlink()
    (imagenette / "data" / "val" / "n02102040").rmdir()
    done = score(script, imagenette)
    assert done.status == 0
    assert "clean: 0.00% is far below chance; does the data set have the weights' order of classes" in done.err


def test_other_names_of_folders_are_refused_with_the_way(script, imagenette):
    (imagenette / "data" / "val" / "n01440764").rename(imagenette / "data" / "val" / "tench")
    refused = score(script, imagenette)
    assert_refused(refused, "has 3 classes, and the classifier 1000; name the class folders as ImageNet does")
