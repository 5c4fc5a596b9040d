"""The sixteen operations with torchvision and kornia, for comparison only.

Both work on batches. torchvision takes one magnitude for all images, so that a plan is applied to groups of equal
operation and magnitude; kornia takes one for each image, in float32. Neither rounds as Pillow does.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from augmentations import OPS, Plan
from utils import UserError

try:
    import kornia
except ImportError:
    kornia = None


def _affine(images: Tensor, *, angle: float = 0.0, move: tuple[float, float] = (0, 0), shear: tuple = (0.0, 0.0)):
    centre = None if angle else [0, 0]
    return F.affine(images, angle, list(move), 1.0, list(shear), InterpolationMode.NEAREST, center=centre)


def _erase(images: Tensor, fraction: float, centre_B2: Tensor) -> Tensor:
    side = int(fraction * images.shape[-1])
    if not side:
        return images
    fill = torch.tensor([125, 123, 114], dtype=torch.uint8, device=images.device)[:, None, None]
    corners = (centre_B2 * images.shape[-1] - side / 2).clamp(min=0).int().tolist()
    return torch.stack([F.erase(image, y, x, side, side, fill) for image, (x, y) in zip(images, corners, strict=True)])


# By the names in augmentations.OPS: (images, magnitude, partners or centres) -> images, all of one magnitude.
TORCHVISION: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "ShearX": lambda images, slope, _: _affine(images, shear=(math.degrees(math.atan(slope)), 0.0)),
    "ShearY": lambda images, slope, _: _affine(images, shear=(0.0, math.degrees(math.atan(slope)))),
    "TranslateX": lambda images, fraction, _: _affine(images, move=(round(fraction * images.shape[-1]), 0)),
    "TranslateY": lambda images, fraction, _: _affine(images, move=(0, round(fraction * images.shape[-2]))),
    "Rotate": lambda images, degrees, _: F.rotate(images, degrees),
    "AutoContrast": lambda images, *_: F.autocontrast(images),
    "Invert": lambda images, *_: F.invert(images),
    "Equalize": lambda images, *_: F.equalize(images),
    "Solarize": lambda images, threshold, _: F.solarize(images, min(threshold, 255)),
    "Posterize": lambda images, bits, _: F.posterize(images, int(bits)),
    "Contrast": lambda images, factor, _: F.adjust_contrast(images, factor),
    "Color": lambda images, factor, _: F.adjust_saturation(images, factor),
    "Brightness": lambda images, factor, _: F.adjust_brightness(images, factor),
    "Sharpness": lambda images, factor, _: F.adjust_sharpness(images, factor),
    "Cutout": _erase,
    "SamplePairing": lambda images, weight, partners: torch.lerp(images.float(), partners.float(), weight).byte(),
}


def with_torchvision(images_BCHW: Tensor, plan: Plan) -> Tensor:
    """The plan on groups of equal operation and magnitude."""
    out_BCHW = images_BCHW.clone()
    for k in range(plan.op_BK.shape[1]):
        groups: dict[tuple[int, float], list[int]] = {}
        choices = zip(plan.op_BK[:, k].tolist(), plan.magnitude_BK[:, k].tolist(), strict=True)
        for number, choice in enumerate(choices):
            groups.setdefault(choice, []).append(number)
        for (row, magnitude), members in groups.items():
            if row >= 0:
                numbers = torch.tensor(members)
                extra = _extra(images_BCHW, plan, row, numbers, k)
                numbers = numbers.to(images_BCHW.device)
                out_BCHW[numbers] = _named(TORCHVISION, "TORCHVISION", row)(out_BCHW[numbers], magnitude, extra)
    return out_BCHW


def normalise(images_BCHW: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return F.normalize(F.to_dtype(images_BCHW, torch.float32, scale=True), mean, std, inplace=True)


def _pixels(values_B: Tensor, size: int, axis: int) -> Tensor:
    moves = torch.zeros(len(values_B), 2, device=values_B.device)
    moves[:, axis] = values_B * size
    return moves


def _kornia_cutout(images: Tensor, fraction_B: Tensor, centre_B2: Tensor) -> Tensor:
    line = torch.arange(images.shape[-1], device=images.device)
    centre_B21 = (centre_B2 * images.shape[-1]).to(line.device)[..., None]
    near = ((line - centre_B21).abs() * 2 < fraction_B[:, None, None] * images.shape[-1]).float()
    return images * (1 - near[:, 1, None, :, None] * near[:, 0, None, None, :])


# By the same names: (images in 0..1, magnitude of each, partners or centres) -> images.
KORNIA: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ShearX": lambda images, slope, _: kornia.geometry.shear(images, _pixels(slope, 1, 0), "nearest"),
    "ShearY": lambda images, slope, _: kornia.geometry.shear(images, _pixels(slope, 1, 1), "nearest"),
    "TranslateX": lambda im, part, _: kornia.geometry.translate(im, _pixels(part, im.shape[-1], 0), "nearest"),
    "TranslateY": lambda im, part, _: kornia.geometry.translate(im, _pixels(part, im.shape[-2], 1), "nearest"),
    "Rotate": lambda images, degrees, _: kornia.geometry.rotate(images, degrees, mode="nearest"),
    "AutoContrast": lambda images, *_: kornia.enhance.normalize_min_max(images),
    "Invert": lambda images, *_: kornia.enhance.invert(images),
    "Equalize": lambda images, *_: kornia.enhance.equalize(images),
    "Solarize": lambda images, threshold, _: kornia.enhance.solarize(images, (threshold / 256).clamp(max=1.0)),
    "Posterize": lambda images, bits, _: kornia.enhance.posterize(images, bits.int()),
    "Contrast": lambda images, factor, _: kornia.enhance.adjust_contrast_with_mean_subtraction(images, factor),
    "Color": lambda images, factor, _: kornia.enhance.adjust_saturation_with_gray_subtraction(images, factor),
    "Brightness": lambda images, factor, _: kornia.enhance.adjust_brightness_accumulative(images, factor),
    "Sharpness": lambda images, factor, _: kornia.enhance.sharpness(images, factor),
    "Cutout": _kornia_cutout,
    "SamplePairing": lambda images, weight, partners: torch.lerp(images, partners, weight[:, None, None, None]),
}


def with_kornia(images_BCHW: Tensor, plan: Plan) -> Tensor:
    """The plan on groups of equal operation; uint8 in and out, float32 between."""
    first_BCHW = images_BCHW.float() / 255
    out_BCHW = first_BCHW.clone()
    for k in range(plan.op_BK.shape[1]):
        for row in plan.op_BK[:, k].unique().tolist():
            if row >= 0:
                numbers = (plan.op_BK[:, k] == row).nonzero()[:, 0]
                extra = _extra(first_BCHW, plan, row, numbers, k)
                magnitudes = plan.magnitude_BK[numbers, k].float().to(images_BCHW.device)
                numbers = numbers.to(images_BCHW.device)
                out_BCHW[numbers] = _named(KORNIA, "KORNIA", row)(out_BCHW[numbers], magnitudes, extra)
    return (out_BCHW * 255).byte()


def _named(table: dict[str, Callable], name: str, row: int) -> Callable:
    if OPS[row].name not in table:
        raise UserError(f"{name} in benchmarks/parts/libraries.py has no {OPS[row].name}: add that library's function")
    return table[OPS[row].name]


def _extra(images_BCHW: Tensor, plan: Plan, row: int, numbers: Tensor, k: int) -> Tensor | None:
    """The partners or the centres that the operation of this row needs."""
    match OPS[row].needs:
        case "partner":
            return images_BCHW[plan.partner_BK[numbers, k].to(images_BCHW.device)]
        case "centre":
            return plan.centre_BK2[numbers, k]
    return None
