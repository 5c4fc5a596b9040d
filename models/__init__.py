"""Networks by name: `build_model("wresnet28_10", num_classes=10)`. A new one is a file here and a row of FAMILIES."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.augmix import allconv, densenet, resnext
from models.preactresnet import preactresnet
from models.pyramidnet import pyramidnet
from models.resnet import resnet, resnet_d
from models.shakeshake import shakeshake
from models.wideresnet import wideresnet


class Family(NamedTuple):
    """Networks of one builder; form: of their names, for messages. The pattern's groups are its integer arguments."""

    form: str
    pattern: str
    builder: Callable[..., nn.Module]


FAMILIES = (
    Family("wresnet<depth>_<width>", r"wresnet(?P<depth>\d+)_(?P<width>\d+)", wideresnet),
    Family("shakeshake<depth>_2x<width>d", r"shakeshake(?P<depth>\d+)_2x(?P<width>\d+)d", shakeshake),
    Family("pyramid<depth>_<alpha>", r"pyramid((?P<depth>\d+)_(?P<alpha>\d+))?", pyramidnet),
    Family("resnet<depth>", r"resnet(?P<depth>\d+)", resnet),
    Family("resnet<depth>d", r"resnet(?P<depth>\d+)d", resnet_d),
    Family("preactresnet<depth>", r"preactresnet(?P<depth>\d+)", preactresnet),
    Family(
        "resnext<depth>_<cardinality>x<width>d", r"resnext(?P<depth>\d+)_(?P<cardinality>\d+)x(?P<width>\d+)d", resnext
    ),
    Family("densenet<depth>_<growth>", r"densenet(?P<depth>\d+)_(?P<growth>\d+)", densenet),
    Family("allconv", r"allconv", allconv),
)


def build_model(name: str, num_classes: int, **options) -> nn.Module:
    """The network called `name`: normalised float images (B, 3, H, W) -> logits (B, num_classes).

    options: other arguments of the family's builder, such as `dropout` of wide ResNets.
    Raises ValueError for an unknown name, numbers that the family does not support, and unknown options.
    """
    for family in FAMILIES:
        if match := re.fullmatch(family.pattern, name):
            numbers = {key: int(value) for key, value in match.groupdict().items() if value is not None}
            known = inspect.signature(family.builder).parameters.keys() - numbers.keys()
            if unknown := sorted(options.keys() - known):
                raise ValueError(f"{name} has no option {unknown[0]!r}")
            return family.builder(num_classes, **numbers, **options)
    raise ValueError(f"unknown model {name!r}; there are {', '.join(family.form for family in FAMILIES)}")


@functools.cache
def check_model(name: str, **options) -> None:
    """Raise what `build_model` would raise for this name and these options, without allocating memory.

    Remembered, since a script checks the same network several times, which takes up to half a second.
    """
    with torch.device("meta"), _NoDraws():
        build_model(name, num_classes=2, **options)


class _NoDraws(TorchFunctionMode):
    """Leaves weights undrawn: on the meta device they have no values, and drawing them loads hundreds of modules."""

    def __torch_function__(self, function, types, args=(), kwargs=None) -> Any:
        return args[0] if function is Tensor.normal_ else function(*args, **(kwargs or {}))
