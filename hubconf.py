"""Entry points of torch.hub: the transform, and the networks with weights.

    augment = torch.hub.load(repo, "augment")                                  # augmentations.Augment
    transform = torch.hub.load(repo, "published", "trivialaugment")            # policies.transform
    model = torch.hub.load(repo, "wresnet28_10", num_classes=100)
    model = torch.hub.load(repo, "wresnet28_10", weights="logs/run/model.pt")  # a model.pt, or any state dict
    model = torch.hub.load(repo, "wresnet28_10", weights="https://...", sha256="...")
    model = torch.hub.load(repo, "network", "wresnet16_8")                     # any name of models/

`repo` is this folder, with source="local", or "owner/name" on GitHub. Networks take normalised images.
"""

import functools
import importlib
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

dependencies = ["torch", "torchvision", "yaml", "tqdm"]

NETWORKS = (
    "wresnet28_10", "wresnet40_2", "shakeshake26_2x32d", "shakeshake26_2x96d", "shakeshake26_2x112d", "pyramid272_200",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200", "resnet50d", "preactresnet18",
    "resnext29_4x32d", "densenet100_12", "allconv",
)  # fmt: skip
OWN = (
    "augmentations", "config", "controller", "dataloader", "datasets", "evaluation", "models", "policies", "training",
    "utils",
)  # fmt: skip


def augment(*args: Any, **options: Any) -> nn.Module:
    """`augmentations.Augment` of these arguments: a transform for uint8 batches on any device."""
    return _module("augmentations").Augment(*args, **options)


def published(name: str, **settings: Any) -> nn.Module:
    """`policies.transform` of these arguments: TrivialAugment, RandAugment, AutoAugment or AugMix."""
    return _module("policies").transform(name, **settings)


def network(
    name: str,
    num_classes: int | None = None,
    *,
    weights: str | Path | None = None,
    sha256: str | None = None,
    ema: bool = False,
    **options: Any,
) -> nn.Module:
    """The network called `name`, in evaluation mode where it has weights.

    num_classes: that of the weights or, without them, 10.
    weights: a file, or an address (http, https). sha256: the hash that the file must have; an address needs it.
    ema: of weights and their average in one file, take the average.
    options: of the network: `dropout`.

    Raises ValueError for an unknown name, and for weights that do not fit or have another hash.
    """
    if weights is None:
        return _module("models").build_model(name, num_classes or 10, **options)
    reading, utils = _module("evaluation.weights"), _module("utils")
    try:
        with tempfile.TemporaryDirectory() as folder:
            file = _fetched(str(weights), sha256, Path(folder))
            found = utils.sha256_of(file) if sha256 and file.is_file() else sha256
            if found != sha256:
                raise ValueError(f"{weights}: has the hash {found}, not {sha256}; it is damaged, or another file")
            config = _module("config").Config(model=name, **options)
            classifier, _ = reading.read_state_dict(file, config, averaged=ema)
            model = classifier.build()
    except utils.UserError as error:
        raise ValueError(str(error)) from None
    if num_classes not in (None, classifier.num_classes):
        raise ValueError(f"{weights}: is for {classifier.num_classes} classes, not {num_classes}; leave that out")
    return model.eval()


def _fetched(weights: str, sha256: str | None, folder: Path) -> Path:
    """The file of the weights, downloaded to the folder where they are an address."""
    if not weights.startswith(("http://", "https://")):
        return Path(weights)
    if sha256 is None:
        raise ValueError(f"{weights}: give the file's hash, sha256=...; what is downloaded is checked")
    file = folder / "weights"
    try:
        torch.hub.download_url_to_file(weights, str(file))
    except OSError as error:
        raise ValueError(f"{weights}: cannot be downloaded ({error}); fetch it by hand, and name the file") from None
    return file


def _module(name: str) -> ModuleType:
    """A module of this project, whose names are short: one of that name may have been imported from elsewhere."""
    here = Path(__file__).resolve().parent
    for own in ("augmentations",) if name == "augmentations" else OWN:
        other = getattr(sys.modules.get(own), "__file__", None)
        if other and here not in Path(other).resolve().parents:
            raise ValueError(f"{other} is in use as {own!r}, a name that this project needs; use a process for each")
    return importlib.import_module(name)


globals().update((name, functools.wraps(network)(functools.partial(network, name))) for name in NETWORKS)
