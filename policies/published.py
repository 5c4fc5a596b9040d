"""Augmentations as published, drawn for each copy and executed by `augmentations.apply`.

TrivialAugment (Mueller and Hutter, ICCV 2021), RandAugment (Cubuk et al., 2020) and AutoAugment (Cubuk et al., 2019)
equal torchvision's classes on Pillow images, which the tests compare draw by draw. AugMix is that of Hendrycks et al.
(ICLR 2020).

Shape suffixes: N distinct images of a batch, M copies of each, B = N * M, image-major; K operations of a copy, applied
in order; O operations to choose from, S strengths of one, 2 signs; V views that a copy is mixed from, W = V - 1 chains;
C channels, but for logits_BC, where C counts classes; H, W rows and columns of images.
"""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from augmentations import Augment, Plan, apply, row_of, upload
from policies.sources import PolicySource

STRENGTHS = 31  # of TrivialAugment and RandAugment; AutoAugment's tables have 10
IDENTITY = "Identity"
GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


class Range(NamedTuple):
    """Strengths of an operation in torchvision's unit: pixels, slopes, degrees, and distances from 1 of factors."""

    values: tuple[float, ...]
    signed: bool = False


Space = dict[str, Range]


def space(
    strengths: int, *, shear: float, pixels: tuple[float, float], degrees: float, factor: float, bits: int
) -> Space:
    """Ranges from 0 to the given extremes, in float32 like torchvision's.

    pixels: along x and along y. bits: the most that Posterize removes.
    """

    def up_to(extreme: float) -> Range:
        return Range(tuple(torch.linspace(0.0, extreme, strengths).tolist()), signed=True)

    taken = (torch.arange(strengths) / ((strengths - 1) / bits)).round()
    extremes = (shear, shear, *pixels, degrees)
    ranges = {name: up_to(extreme) for name, extreme in zip(GEOMETRY, extremes, strict=True)}
    ranges |= dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), up_to(factor))
    ranges["Posterize"] = Range(tuple((8 - taken).tolist()))
    ranges["Solarize"] = Range(tuple(torch.linspace(255.0, 0.0, strengths).tolist()))
    return ranges | dict.fromkeys(("AutoContrast", "Equalize"), Range((0.0,)))


def usual_space(strengths: int, size: tuple[int, int]) -> Space:
    """The ranges of RandAugment and AutoAugment, whose translations are relative to images of 331 pixels."""
    height, width = size
    pixels = (150.0 / 331.0 * width, 150.0 / 331.0 * height)
    return space(strengths, shear=0.3, pixels=pixels, degrees=30.0, factor=0.9, bits=4)


def trivial_space(size: tuple[int, int]) -> Space:
    """The ranges of TrivialAugment (wide), the same for every image size."""
    return {IDENTITY: Range((0.0,))} | space(
        STRENGTHS, shear=0.99, pixels=(32.0, 32.0), degrees=135.0, factor=0.99, bits=6
    )


def engine_magnitude(name: str, value: float, size: tuple[int, int]) -> float:
    """A strength, sign included, in the unit of `augmentations.Plan`, rounded as torchvision does on Pillow images."""
    height, width = size
    match name:
        case "ShearX" | "ShearY":  # through degrees and back
            angle = math.radians(math.degrees(math.atan(value)))
            return math.tan(angle) if name == "ShearX" else math.sin(angle) / math.cos(angle)
        case "TranslateX":  # to the right; ours moves to the left
            return -int(value) / width
        case "TranslateY":
            return -int(value) / height
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return 1.0 + value
    return value


class OperationDraws(NamedTuple):
    """For each copy: operations of the space, int64; strengths, int64; whether negated and whether applied, bool."""

    choice_BK: Tensor
    strength_BK: Tensor
    negative_BK: Tensor
    applied_BK: Tensor


class PerImage(PolicySource, ABC):
    """A source that draws for each copy separately: its M policies are the same."""

    description = ""

    def __init__(self, M: int, K: int, **options: Any):
        super().__init__(M, 1, K, **options)
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of sizes that were seen

    @abstractmethod
    def space(self, size: tuple[int, int]) -> Space:
        """The operations and strengths to choose from, for images of (H, W)."""

    @abstractmethod
    def draw(self, B: int, generator: torch.Generator) -> OperationDraws:
        """OperationDraws for B copies."""

    def plan_of(self, draws: OperationDraws, size: tuple[int, int]) -> Plan:
        """The plan of these draws for images of (H, W)."""
        if size not in self._tables:
            self._tables = {size: self._tables_for(size)} | (self._tables if len(self._tables) < 8 else {})
        row_O, magnitude_OS2 = self._tables[size]
        op_BK = row_O[draws.choice_BK].masked_fill(~draws.applied_BK, -1)
        return Plan(op_BK, magnitude_OS2[draws.choice_BK, draws.strength_BK, draws.negative_BK.long()])

    def by_name(self) -> list:
        return []

    def descriptions(self) -> list[str]:
        return [self.description] * self.M

    def _plan(self, N: int, size: tuple[int, int], generator: torch.Generator, groups: int) -> Plan:
        return self.plan_of(self.draw(N * self.M, generator), size)

    def _tables_for(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rows of OPS, -1 for the identity, and magnitudes by strength and sign (equal for unsigned operations)."""
        ranges = self.space(size)
        most = max(len(one.values) for one in ranges.values())
        magnitude_OS2 = torch.zeros(len(ranges), most, 2, dtype=torch.float64)
        for number, (name, (values, signed)) in enumerate(ranges.items()):
            both = [[engine_magnitude(name, sign * v, size) for sign in (1, -1 if signed else 1)] for v in values]
            magnitude_OS2[number, : len(values)] = torch.tensor(both, dtype=torch.float64)
        return torch.tensor([-1 if name == IDENTITY else row_of(name) for name in ranges]), magnitude_OS2


class TrivialAugment(PerImage):
    """One operation, one strength, both uniformly random."""

    description = f"TrivialAugment: one of 14 operations at one of {STRENGTHS} strengths, drawn for each copy"

    def __init__(self, M: int, **options: Any):
        super().__init__(M, 1, **options)

    def space(self, size: tuple[int, int]) -> Space:
        return trivial_space(size)

    def draw(self, B: int, generator: torch.Generator) -> OperationDraws:
        count_O = torch.tensor([len(one.values) for one in trivial_space((1, 1)).values()])
        choice_B1 = torch.randint(len(count_O), (B, 1), generator=generator)
        strength_B1 = torch.randint(STRENGTHS, (B, 1), generator=generator).minimum(count_O[choice_B1] - 1)
        negative_B1 = torch.randint(2, (B, 1), generator=generator).bool()
        return OperationDraws(choice_B1, strength_B1, negative_B1, torch.ones_like(negative_B1))


class RandAugment(PerImage):
    """n uniformly random operations at strength m of 0..30."""

    def __init__(self, M: int, n: int, m: int, **options: Any):
        super().__init__(M, n, **options)
        self.m = m
        self.description = f"RandAugment: {n} of 14 operations at strength {m} of {STRENGTHS - 1}, drawn for each copy"

    def space(self, size: tuple[int, int]) -> Space:
        ranges = {IDENTITY: Range((0.0,))} | usual_space(STRENGTHS, size)
        return {name: Range(values[self.m : self.m + 1] or values, signed) for name, (values, signed) in ranges.items()}

    def draw(self, B: int, generator: torch.Generator) -> OperationDraws:
        choice_BK = torch.randint(14, (B, self.K), generator=generator)
        negative_BK = torch.randint(2, (B, self.K), generator=generator).bool()
        return OperationDraws(choice_BK, torch.zeros_like(choice_BK), negative_BK, torch.ones_like(negative_BK))


class AutoAugmentPolicies(PerImage):
    """One of 25 learned sub-policies of two operations, each applied with its own probability."""

    def __init__(self, M: int, learned_on: str, **options: Any):
        super().__init__(M, 2, **options)
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # takes seconds to import

        table = AutoAugment(AutoAugmentPolicy(learned_on)).policies
        self.description = f"AutoAugment: one of {len(table)} sub-policies learned on {learned_on}, drawn for each copy"
        names = list(self.space((1, 1)))
        self._choice_RK = torch.tensor([[names.index(name) for name, _, _ in pair] for pair in table])
        self._strength_RK = torch.tensor([[strength or 0 for _, _, strength in pair] for pair in table])
        self._probability_RK = torch.tensor([[probability for _, probability, _ in pair] for pair in table])

    def space(self, size: tuple[int, int]) -> Space:
        return usual_space(10, size) | {"Invert": Range((0.0,))}

    def draw(self, B: int, generator: torch.Generator) -> OperationDraws:
        return self.draws_of(*self.raw_draws(B, generator))

    def raw_draws(self, B: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """For each copy the sub-policy (B,), a number in 0..1 and a coin (B, 2), as torchvision's `get_params`."""
        subpolicy_B = torch.randint(len(self._choice_RK), (B,), generator=generator)
        return subpolicy_B, torch.rand(B, 2, generator=generator), torch.randint(2, (B, 2), generator=generator)

    def draws_of(self, subpolicy_B: Tensor, number_BK: Tensor, coin_BK: Tensor) -> OperationDraws:
        applied_BK = number_BK <= self._probability_RK[subpolicy_B]
        return OperationDraws(self._choice_RK[subpolicy_B], self._strength_RK[subpolicy_B], coin_BK == 0, applied_BK)


class AugMix(PolicySource):
    """Each copy is a mixture of the image and of chains of operations on it; `clean_first`: the first copy is clean.

    A copy's views are the image and W = 3 chains of one to three operations of random strength, up to `severity` of 10:
    3 for CIFAR and 1 for ImageNet in its authors' code. Shears and rotations interpolate.
    """

    OPS = (*GEOMETRY, "AutoContrast", "Equalize", "Posterize", "Solarize")
    WIDTH, DEPTH, LEAST = 3, 3, 0.1
    views = 1 + WIDTH

    def __init__(self, M: int, *, clean_first: bool = False, on_imagenet: bool = False, **options: Any):
        super().__init__(M, 1, self.DEPTH, **options)
        self.clean_first, self.severity = clean_first, 1.0 if on_imagenet else 3.0
        self._row_O = torch.tensor([row_of(name) for name in self.OPS])

    def by_name(self) -> list:
        return []

    def descriptions(self) -> list[str]:
        mixed = f"AugMix: the image mixed with {self.WIDTH} chains of up to {self.DEPTH} operations"
        return ["as it is" if m == 0 and self.clean_first else mixed for m in range(self.M)]

    def weights(self, N: int, generator: torch.Generator) -> Tensor:
        """(1 - m, m w_1, ..., m w_W) with m from Beta(1, 1), which is uniform, and w from Dirichlet(1, ..., 1)."""
        B = N * self.M
        chain_BW = torch.empty(B, self.WIDTH, dtype=torch.float64).exponential_(generator=generator)
        m_B1 = torch.rand(B, 1, dtype=torch.float64, generator=generator)
        weight_BV = torch.cat((1 - m_B1, m_B1 * chain_BW / chain_BW.sum(1, keepdim=True)), dim=1)
        if self.clean_first:
            weight_BV[:: self.M] = torch.tensor([1.0] + [0.0] * self.WIDTH, dtype=torch.float64)
        return weight_BV.float()

    def _plan(self, N: int, size: tuple[int, int], generator: torch.Generator, groups: int) -> Plan:
        shape = (N * self.M, self.WIDTH, self.DEPTH)
        depth_BW1 = torch.randint(1, self.DEPTH + 1, (*shape[:2], 1), generator=generator)
        choice_BWK = torch.randint(len(self.OPS), shape, generator=generator)
        draw_BWK = torch.rand(shape, dtype=torch.float64, generator=generator)
        negative_BWK = torch.randint(2, shape, generator=generator).bool()
        level_BWK = self.LEAST + (self.severity - self.LEAST) * draw_BWK
        op_BWK = self._row_O[choice_BWK].masked_fill(torch.arange(self.DEPTH) >= depth_BW1, -1)
        magnitude_BWK = self._magnitudes(choice_BWK, level_BWK, negative_BWK, size)
        itself = (torch.full_like(op_BWK[:, :1], -1), torch.zeros_like(magnitude_BWK[:, :1]))
        views = (torch.cat(pair, dim=1).flatten(0, 1) for pair in zip(itself, (op_BWK, magnitude_BWK), strict=True))
        return Plan(*views, bilinear=True)

    def _magnitudes(self, choice: Tensor, level: Tensor, negative: Tensor, size: tuple[int, int]) -> Tensor:
        """The recipe's strengths at levels of 0..10, in the units of `augmentations.Plan`."""
        height, width = size
        tenth = level / 10
        signed = torch.where(negative, -1.0, 1.0)
        by_name = {
            "Posterize": 4 - (tenth * 4).floor(),
            "Rotate": signed * (tenth * 30).floor(),
            "Solarize": 256 - (tenth * 256).floor(),
            "ShearX": signed * tenth * 0.3,
            "ShearY": signed * tenth * 0.3,
            "TranslateX": signed * (tenth * (width / 3)).floor() / width,
            "TranslateY": signed * (tenth * (height / 3)).floor() / height,
        }
        magnitude = torch.zeros_like(level)
        for number, name in enumerate(self.OPS):
            if name in by_name:
                magnitude = torch.where(choice == number, by_name[name], magnitude)
        return magnitude


def mix(views_BCHW: Tensor, weight_BV: Tensor) -> Tensor:
    """The weighted sum of a copy's views, which follow each other: uint8 (B * V, C, H, W) to float32 (B, C, H, W)."""
    weight = upload(weight_BV, views_BCHW.device)[..., None, None, None]
    by_copy = views_BCHW.unflatten(0, weight_BV.shape)
    mixed_BCHW = by_copy[:, 0] * weight[:, 0]
    for view in range(1, weight_BV.shape[1]):
        mixed_BCHW += by_copy[:, view] * weight[:, view]
    return mixed_BCHW


def augmix_loss(loss_B: Tensor, logits_BC: Tensor, M: int, weight: float) -> Tensor:
    """Cross-entropy of each image's first copy, plus `weight` times the Jensen-Shannon divergence of its M copies.

    loss_B: cross-entropy of every copy; logits_BC: float32. The divergence is the mean over the copies of KL(p_m || p),
    p their mean, which is clamped to 1e-7 as in the recipe; both terms are means over the images.
    """
    log_p_NMC = logits_BC.log_softmax(1).unflatten(0, (-1, M))
    log_mean_N1C = log_p_NMC.exp().mean(1, keepdim=True).clamp(1e-7, 1).log()
    divergence = (log_p_NMC.exp() * (log_p_NMC - log_mean_N1C)).sum(2).mean()
    return loss_B.view(-1, M)[:, 0].mean() + weight * divergence


class PublishedTransform(Augment):
    """A source of policies as a transform for other training loops; see `policies.transform`."""

    def __init__(self, source: PolicySource, **options: Any):
        super().__init__(**options)
        self.source = source

    def plan(self, B: int, size: tuple[int, int]) -> Plan:
        return self.source.plan(B, size, self._generator())

    def transform(self, images_BCHW: Tensor) -> Tensor:
        if self.source.views == 1:
            return super().transform(images_BCHW)
        plan = self.plan(len(images_BCHW), tuple(images_BCHW.shape[-2:]))
        views_BCHW = apply(images_BCHW.repeat_interleave(self.source.views, 0), plan)
        return mix(views_BCHW, self.source.weights(len(images_BCHW), self._generator())).round_().to(torch.uint8)

    def extra_repr(self) -> str:
        return self.source.descriptions()[0]
