"""Networks by name: `build_model("wresnet28_10", num_classes=10)`. One file per family."""

import re
from collections.abc import Callable

import torch
from torch import nn

from models.wideresnet import wideresnet

# Name pattern, its form as users write it, and the builder; the pattern's groups are the builder's first arguments.
FAMILIES: tuple[tuple[str, str, Callable[..., nn.Module]], ...] = (
    (r"wresnet(\d+)_(\d+)", "wresnet<depth>_<width>", wideresnet),
)


def build_model(name: str, num_classes: int, **options) -> nn.Module:
    """The network called `name`: normalised float images (B, 3, H, W) -> logits (B, num_classes).

    options: what the family's builder takes, such as `dropout`.
    Raises ValueError for an unknown name or one whose numbers do not fit the family.
    """
    for pattern, _, builder in FAMILIES:
        if match := re.fullmatch(pattern, name):
            return builder(*map(int, match.groups()), num_classes, **options)
    raise ValueError(f"unknown model {name!r}; there are {', '.join(form for _, form, _ in FAMILIES)}")


def check_model(name: str, **options) -> None:
    """Raise what `build_model` would raise for this name and these options, without taking memory."""
    with torch.device("meta"):
        build_model(name, num_classes=2, **options)
