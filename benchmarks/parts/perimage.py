"""The usual augmentation, image by image, with Pillow and torchvision in worker processes.

For comparison only. From the same draws it makes the same tensors as the batched way, bit for bit, as
tests/benchmarks/test_speed_scripts.py checks.

Shape suffixes: N images of the data, M copies of one; C, H, W as usual.
"""

import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as on_pillow

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from augmentations import OPS, Op, row_of
from config import Config
from dataloader import Normalise
from policies.sources import PolicySource
from utils import UserError


class Operation(NamedTuple):
    """An operation by name, with its magnitude, sign included.

    extra: what its row of OPS needs, the partner or the centre as fractions of width and height.
    """

    name: str
    magnitude: float
    extra: Any = None


class ImageDraws(NamedTuple):
    """All random choices for one copy.

    shift: of the crop in the zero-padded image, x and y in pixels. blank: the centre of Cutout in pixels.
    """

    shift: tuple[int, int]
    flipped: bool
    operations: Sequence[Operation]
    blank: tuple[int, int]


@dataclass
class PillowPipeline(Dataset):
    """The M copies of one image and its label, by (position in the data, seed).

    images: uint8 (N, H, W, C). policies: those in use now are applied.
    """

    config: Config
    policies: PolicySource
    images: np.ndarray
    labels: Sequence[int]

    def __post_init__(self):
        levels = self.policies.levels
        self.policies_MQK = [
            [
                [(OPS[row_of(name)], OPS[row_of(name)].magnitude(level, levels)) for name, level, *_ in subpolicy]
                for subpolicy in policy
            ]
            for policy in self.policies.by_name()
        ]
        normalise = Normalise(self.config, torch.device("cpu"))
        self.mean, self.std = normalise.mean_C11.flatten().tolist(), normalise.std_C11.flatten().tolist()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        position, seed = key
        image, rng = Image.fromarray(self.images[position]), random.Random(seed)
        crop = self.draw_crop(rng)
        copies = []
        for subpolicies_QK in self.policies_MQK:
            if self.config.crop_per_copy:
                crop = self.draw_crop(rng)
            operations = [self.draw_operation(rng, *choice) for choice in rng.choice(subpolicies_QK)]
            blank = rng.randrange(image.width), rng.randrange(image.height)
            copies.append(self.make_copy(image, ImageDraws(*crop, operations, blank)))
        return torch.stack(copies), self.labels[position]

    def draw_crop(self, rng: random.Random) -> tuple[tuple[int, int], bool]:
        padding = self.config.crop_padding
        shift = rng.randint(-padding, padding), rng.randint(-padding, padding)
        return shift, self.config.flip and not self.config.cropped_when_read and rng.random() < 0.5

    def draw_operation(self, rng: random.Random, op: Op, magnitude: float) -> Operation:
        if op.signed and rng.random() < 0.5:
            magnitude = -magnitude
        if op.needs == "partner":
            return Operation(op.name, magnitude, Image.fromarray(self.images[rng.randrange(len(self))]))
        return Operation(op.name, magnitude, (rng.random(), rng.random()) if op.needs == "centre" else None)

    def make_copy(self, image: Image.Image, draws: ImageDraws) -> Tensor:
        """float32 (C, H, W): crop, flip, the policy's operations, normalisation, Cutout."""
        copy = run(self.crop_and_flip(image, draws), draws.operations)
        input_CHW = on_pillow.normalize(on_pillow.to_tensor(copy), self.mean, self.std, inplace=True)
        (x, y), side = draws.blank, self.config.cutout
        left, top = max(0, x - side // 2), max(0, y - side // 2)
        input_CHW[:, top : y + (side + 1) // 2, left : x + (side + 1) // 2] = 0.0
        return input_CHW

    def crop_and_flip(self, image: Image.Image, draws: ImageDraws) -> Image.Image:
        if padding := self.config.crop_padding:
            x, y = draws.shift
            padded = on_pillow.pad(image, padding)
            image = on_pillow.crop(padded, y + padding, x + padding, image.height, image.width)
        return on_pillow.hflip(image) if draws.flipped else image


def run(image: Image.Image, operations: Sequence[Operation]) -> Image.Image:
    """The operations, one after the other."""
    for name, magnitude, extra in operations:
        if name not in OPERATIONS:
            raise UserError(f"OPERATIONS in benchmarks/parts/perimage.py has no {name}: add what Pillow does")
        image = OPERATIONS[name](image, magnitude, extra)
    return image


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _cutout(image: Image.Image, fraction: float, centre: tuple[float, float]) -> Image.Image:
    if fraction == 0:
        return image
    side = fraction * image.width
    left, top = (int(max(0, at * size - side / 2)) for at, size in zip(centre, image.size, strict=True))
    image = image.copy()
    corners = (left, top, min(image.width, left + side), min(image.height, top + side))
    ImageDraw.Draw(image).rectangle(corners, (125, 123, 114))
    return image


# By the names in augmentations.OPS: (image, magnitude, partner or centre) -> image.
OPERATIONS: dict[str, Callable[[Image.Image, float, Any], Image.Image]] = {
    "ShearX": lambda image, slope, _: _affine(image, 1, slope, 0, 0, 1, 0),
    "ShearY": lambda image, slope, _: _affine(image, 1, 0, 0, slope, 1, 0),
    "TranslateX": lambda image, fraction, _: _affine(image, 1, 0, fraction * image.width, 0, 1, 0),
    "TranslateY": lambda image, fraction, _: _affine(image, 1, 0, 0, 0, 1, fraction * image.height),
    "Rotate": lambda image, degrees, _: image.rotate(degrees),
    "AutoContrast": lambda image, *_: ImageOps.autocontrast(image),
    "Invert": lambda image, *_: ImageOps.invert(image),
    "Equalize": lambda image, *_: ImageOps.equalize(image),
    "Solarize": lambda image, threshold, _: ImageOps.solarize(image, threshold),
    "Posterize": lambda image, bits, _: ImageOps.posterize(image, int(bits)),
    "Contrast": lambda image, factor, _: ImageEnhance.Contrast(image).enhance(factor),
    "Color": lambda image, factor, _: ImageEnhance.Color(image).enhance(factor),
    "Brightness": lambda image, factor, _: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor, _: ImageEnhance.Sharpness(image).enhance(factor),
    "Cutout": _cutout,
    "SamplePairing": lambda image, weight, partner: Image.blend(image, partner, weight),
}
