"""The embedded data set: ten classes of shapes, drawn from a seed at any size, nothing to download.

The test split is shifted, rotated, sheared, lit and coloured more variably than the training split, so that
augmentation can help. It is for trying and testing the software in a minute; it says nothing about photographs.
"""

import math

import torch
from torch import Tensor

from utils import keyed_generator

# Which points belong to a shape of unit radius, from x, y, the distance r from the centre and box = max(|x|, |y|).
INSIDE = {
    "disc": lambda x, y, r, box: r < 0.9,
    "ring": lambda x, y, r, box: (r < 1.0) & (r > 0.55),
    "square": lambda x, y, r, box: box < 0.8,
    "frame": lambda x, y, r, box: (box < 0.9) & (box > 0.5),
    "triangle": lambda x, y, r, box: (y < 0.6) & (1.73 * x.abs() < y + 1.1),
    "star": lambda x, y, r, box: r < 0.72 + 0.33 * (5 * torch.atan2(y, x)).cos(),
    "plus": lambda x, y, r, box: (x.abs().minimum(y.abs()) < 0.3) & (box < 0.95),
    "crescent": lambda x, y, r, box: (r < 1.0) & ((x - 0.45).hypot(y) > 0.75),
    "bars": lambda x, y, r, box: (box < 0.95) & (y.abs() > 0.35),
    "dots": lambda x, y, r, box: ((x.abs() - 0.6).hypot(y) < 0.4) | (x.hypot(y.abs() - 0.6) < 0.4),
}
CLASSES = tuple(INSIDE)
SIZE = 32  # pixels, which lengths below are given for; images of another side show the same scaled
COUNTS = {"train": 4000, "test": 2000}
# Half-widths of the uniform draws of each split: shift in pixels, turn in degrees, shear as a slope, colour and light
# as shares of the range of brightness. swap: a draw from -1..1 below it swaps the colours: -1 never, 0 in half of them.
SPREAD = {
    "train": {"shift": 2.0, "turn": 8.0, "shear": 0.05, "colour": 0.05, "swap": -1.0, "light": 0.08},
    "test": {"shift": 6.0, "turn": 35.0, "shear": 0.30, "colour": 0.35, "swap": 0.0, "light": 0.35},
}
NOISE = 0.06  # standard deviation of the noise on every value, in both splits
_OVERSAMPLING = 2


def draw_shapes(split: str, side: int = SIZE) -> tuple[Tensor, Tensor]:
    """(images uint8 (B, 3, side, side), labels int64 (B,)) of the "train" or "test" split; always the same."""
    count, spread = COUNTS[split], SPREAD[split]
    g = keyed_generator("shapes", split)
    label_B = torch.arange(count) % len(CLASSES)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=g) * 2 - 1

    mask_BHW = _masks(label_B, spread, side, uniform)
    ink_B3, paper_B3 = _colours(spread, uniform)
    light_BHW = _lighting(spread, side, uniform)
    image_BCHW = paper_B3[:, :, None, None] + mask_BHW[:, None] * (ink_B3 - paper_B3)[:, :, None, None]
    image_BCHW = image_BCHW + light_BHW[:, None] + NOISE * torch.randn(count, 3, side, side, generator=g)
    return (image_BCHW.clamp(0, 1) * 255).round().to(torch.uint8), label_B


def _masks(label_B: Tensor, spread: dict[str, float], side: int, uniform) -> Tensor:
    """How much of each pixel the shape covers, (B, side, side) in 0..1."""
    fine = side * _OVERSAMPLING
    line = (torch.arange(fine) + 0.5) / fine * SIZE - SIZE / 2
    x_BHW = line[None, None, :] - spread["shift"] * uniform(1, 1)
    y_BHW = line[None, :, None] - spread["shift"] * uniform(1, 1)
    x_BHW = x_BHW + spread["shear"] * uniform(1, 1) * y_BHW
    angle_B11 = math.radians(spread["turn"]) * uniform(1, 1)
    cos, sin = angle_B11.cos(), angle_B11.sin()
    radius_B11 = 9.5 + 1.5 * uniform(1, 1)
    x_BHW, y_BHW = (cos * x_BHW + sin * y_BHW) / radius_B11, (cos * y_BHW - sin * x_BHW) / radius_B11
    inside_BHW = torch.empty_like(x_BHW, dtype=torch.bool)
    for label, is_inside in enumerate(INSIDE.values()):
        rows = label_B == label
        x, y = x_BHW[rows], y_BHW[rows]
        inside_BHW[rows] = is_inside(x, y, x.hypot(y), x.abs().maximum(y.abs()))
    return torch.nn.functional.avg_pool2d(inside_BHW.float(), _OVERSAMPLING)


def _colours(spread: dict[str, float], uniform) -> tuple[Tensor, Tensor]:
    """Colours of shape and background, (B, 3) each in 0..1, which differ by at least 0.35 in brightness.

    Light warm shapes on a dark cool background; a larger spread gives more varied colours, some of them swapped.
    """
    warm, cool = torch.tensor([0.85, 0.65, 0.45]), torch.tensor([0.15, 0.25, 0.40])
    ink_B3 = (warm + spread["colour"] * uniform(3)).clamp(0.05, 0.95)
    paper_B3 = (cool + spread["colour"] * uniform(3)).clamp(0.05, 0.95)
    gap_B1 = ink_B3.mean(1, keepdim=True) - paper_B3.mean(1, keepdim=True)
    ink_B3 = ink_B3 + (0.35 - gap_B1).clamp(min=0)
    swapped_B1 = uniform(1) < spread["swap"]
    return torch.where(swapped_B1, paper_B3, ink_B3), torch.where(swapped_B1, ink_B3, paper_B3)


def _lighting(spread: dict[str, float], side: int, uniform) -> Tensor:
    """A gradient of brightness across the image plus a constant, (B, side, side), added to the colours."""
    line = torch.linspace(-1, 1, side)
    slope_x, slope_y, whole = (0.5 * spread["light"] * uniform(1, 1) for _ in range(3))
    return slope_x * line[None, None, :] + slope_y * line[None, :, None] + whole
