"""torch.hub's entry points, loaded from this folder as torch.hub loads them."""

import http.server
import sys
import threading
from functools import partial
from types import ModuleType

import pytest
import torch
from conftest import ROOT

import hubconf
from augmentations import Augment
from models import build_model
from utils import sha256_of

load = partial(torch.hub.load, str(ROOT), source="local")


@pytest.fixture
def saved(tmp_path):
    """A network with 7 classes, and the file of its weights."""
    torch.manual_seed(0)
    model = build_model("wresnet10_1", 7).eval()
    torch.save(
        {"state_dict": model.state_dict(), "ema": {k: v + 1 for k, v in model.state_dict().items()}}, tmp_path / "w.pth"
    )
    return model, tmp_path / "w.pth"


def test_the_transform_and_published_augmentations_are_loaded():
    augment = load("augment", ops=["Rotate"], generator=torch.Generator().manual_seed(0))
    assert type(augment) is Augment
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    assert augment(images).shape == images.shape
    assert "31 strengths" in repr(load("published", "trivialaugment"))


def test_every_network_is_listed_and_built():
    assert set(hubconf.NETWORKS) <= set(dir(hubconf)), "torch.hub.list lists what dir does"
    for name in hubconf.NETWORKS:
        with torch.device("meta"):
            *_, last = load(name, num_classes=3).parameters()
        assert last.shape == (3,)
    assert [p.shape for p in load("allconv").parameters()] == [p.shape for p in build_model("allconv", 10).parameters()]


def test_weights_are_read_from_a_file(saved):
    model, file = saved
    loaded = load("network", "wresnet10_1", weights=file, sha256=sha256_of(file))
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    average = load("network", "wresnet10_1", 7, weights=str(file), ema=True)
    assert torch.equal(average.classifier.bias, model.classifier.bias + 1)


def test_weights_are_read_from_an_address_with_their_hash(saved):
    model, file = saved
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(file.parent))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/w.pth"
        loaded = load("network", "wresnet10_1", weights=address, sha256=sha256_of(file))
        assert torch.equal(loaded.classifier.weight, model.classifier.weight)
        with pytest.raises(ValueError, match=r"has the hash .*, not 00; it is damaged, or another file"):
            load("network", "wresnet10_1", weights=address, sha256="00")
        with pytest.raises(ValueError, match=r"cannot be downloaded .*404"):
            load("network", "wresnet10_1", weights=f"{address}.gone", sha256="00")
        server.shutdown()
    with pytest.raises(ValueError, match="give the file's hash"):
        load("network", "wresnet10_1", weights=address)


def test_mistakes_are_named(saved, tmp_path):
    _, file = saved
    for arguments, words in (
        (("network", "wresnet10_2"), "does not fit wresnet10_2 with 7 classes"),
        (("network", "wresnet10_1", 10), "is for 7 classes, not 10"),
        (("network", "vgg16"), "unknown model 'vgg16'; there are wresnet<depth>_<width>"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            load(*arguments, weights=file)
        assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="unknown model 'vgg16'"):
        load("network", "vgg16")
    with pytest.raises(ValueError, match="there is no such file"):
        load("allconv", weights=tmp_path / "nowhere.pth")
    with pytest.raises(RuntimeError, match="Cannot find callable wresnet28_11 in hubconf"):
        load("wresnet28_11")


def test_modules_of_another_project_are_not_taken_for_ours(monkeypatch):
    theirs = ModuleType("models")
    theirs.__file__ = "/elsewhere/models.py"
    monkeypatch.setitem(sys.modules, "models", theirs)
    assert type(load("augment")) is Augment, "it needs one module only"
    with pytest.raises(ValueError, match=r"models\.py is in use as 'models', a name that this project needs"):
        load("allconv")
