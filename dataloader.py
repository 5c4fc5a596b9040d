"""From a data set to the network's inputs: batches, M copies, crop, flip, the policies, normalise, Cutout.

The order of the images and all random draws are keyed by (seed, purpose, epoch or step) and made for the whole batch: a
resumed run sees what an uninterrupted one would have seen, and several processes see what one would.

Shape suffixes: N distinct images of a batch, M copies of each; B = N * M, image-major (copy m of image n is number
n * M + m); V views that a copy is mixed from; C channels, H rows, W columns.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from augmentations import Plan, apply, gather_rows, piece_size, portion, upload
from config import Config
from datasets.loading import load_data as load_data  # for those who import it from here, as main.py does
from datasets.loading import statistics
from datasets.splits import Split
from policies.answers import MixedLabels
from policies.published import mix
from policies.sources import PolicySource
from utils import keyed_generator

# inputs_BCHW, float32 in channels_last, and labels_B
MicroBatches = Iterator[tuple[Tensor, Tensor | MixedLabels]]


class Crops(NamedTuple):
    """For each of B copies, its offset in the zero-padded image (x and y in pixels), and whether it is mirrored."""

    shift_B2: Tensor
    flipped_B1: Tensor


class Mixing(NamedTuple):
    """How each copy is mixed with the same policy's copy of another image: mixup, or CutMix where there is a box.

    share: of the image itself, 0 to 1. box: left, top, right and bottom of the other image's pixels, the last two
    exclusive.
    """

    share: float
    box: tuple[int, int, int, int] | None


class BatchDraws(NamedTuple):
    """All random draws for the N * M copies of a step, made for the whole batch before it is split up."""

    crops: Crops | None
    plan: Plan
    weight_BV: Tensor | None  # of the views that a copy is mixed from
    centre_B2: Tensor  # of Cutout's square
    mixing: Mixing | None
    groups: int  # equal parts of the batch in which partners are found, for SamplePairing and for mixing


class TrainLoader:
    """The training images as the network sees them, for this process.

    parts: this process's micro-batches, as ranges of the batch's N images. generator: makes the generator of a key.
    """

    def __init__(
        self,
        split: Split,
        config: Config,
        policies: PolicySource,
        normalise: "Normalise",
        parts: Sequence[range],
        generator: Callable[..., torch.Generator],
    ):
        self.split, self.config, self.policies, self.normalise = split, config, policies, normalise
        self.parts, self.generator = parts, generator
        self.copies = sum(map(len, parts)) * config.M  # that this process makes in a step
        # Where images cost a disk access, a process reads its own part of the batch only.
        self._read = range(config.batch_size) if split.resident else range(parts[0].start, parts[-1].stop)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.split.labels) // self.config.batch_size

    def steps(self, epoch: int, first: int = 0) -> Iterator[tuple[int, MicroBatches]]:
        """(step of the run, its micro-batches) for each step of an epoch from the `first` on.

        A step's draws are made when its first micro-batch is asked for, from the policies in use at that time.
        """
        batches = epoch_batches(len(self.split.labels), self.config.batch_size, self.config.seed, epoch)
        indices = [batch[self._read.start : self._read.stop] for batch in batches[first:]]
        for step, (images_NCHW, labels_N) in enumerate(self.split.batches(indices, epoch), epoch * len(self) + first):
            yield step, self.micro_batches(images_NCHW, labels_N, step)

    def micro_batches(self, images_NCHW: Tensor, labels_N: Tensor, step: int) -> MicroBatches:
        """This process's micro-batches of one step. images_NCHW: those of the batch that this process reads."""
        draws = self.draw(images_NCHW, "train", step, self.config.batch_size)
        for part in self.parts:
            yield (self.mixed if draws.mixing else self.inputs)(images_NCHW, labels_N, draws, part)

    def inputs(self, images_NCHW: Tensor, labels_N: Tensor, draws: BatchDraws, part: range) -> tuple[Tensor, Tensor]:
        """The network's inputs for the images of `part`, before they are mixed, and their labels."""
        M, (height, width), first = self.config.M, images_NCHW.shape[-2:], self._read.start
        copies_BCHW = self.augment(images_NCHW, draws, part, first)
        centre_B2 = draws.centre_B2[part.start * M : part.stop * M]
        kept_B1HW = cutout_mask(self.config.cutout, centre_B2, height, width, images_NCHW.device)
        labels_B = labels_N[part.start - first : part.stop - first].repeat_interleave(M)
        return self.normalise(copies_BCHW, kept_B1HW), labels_B

    def mixed(
        self, images_NCHW: Tensor, labels_N: Tensor, draws: BatchDraws, part: range
    ) -> tuple[Tensor, MixedLabels]:
        """The same after each image's copies are mixed with those of the image before it in its group."""
        M, size = self.config.M, self.config.batch_size // draws.groups
        partners = [n - n % size + (n - 1) % size for n in part]
        outside = sorted(set(partners) - set(part))  # two at most
        made = [self.inputs(images_NCHW, labels_N, draws, one) for one in (part, *(range(n, n + 1) for n in outside))]
        inputs_BCHW, labels_B = map(torch.cat, zip(*made, strict=True)) if outside else made[0]
        place = {n: number for number, n in enumerate([*part, *outside])}
        index_N1 = torch.tensor([place[n] for n in partners])[:, None]
        index_B = upload((index_N1 * M + torch.arange(M)).flatten(), labels_B.device)
        mixed_BCHW = mix_inputs(made[0][0], inputs_BCHW.index_select(0, index_B), draws.mixing)
        return mixed_BCHW, MixedLabels(made[0][1], labels_B.index_select(0, index_B), draws.mixing.share)

    def preview(self, indices: Tensor, epoch: int) -> Tensor:
        """The chosen training images under each policy in use, before normalisation, uint8 (M, images, C, H, W)."""
        images_NCHW, _ = next(iter(self.split.batches([indices])))
        draws = self.draw(images_NCHW, "preview", epoch, len(indices))
        copies_BCHW = self.augment(images_NCHW, draws, range(len(indices))).round().to(torch.uint8)
        return copies_BCHW.unflatten(0, (-1, self.config.M)).transpose(0, 1)

    def draw(self, images_NCHW: Tensor, purpose: str, step: int, N: int) -> BatchDraws:
        """Draws for a batch of N images, keyed by purpose and step. images_NCHW: all of it, or this process's part."""
        height, width = images_NCHW.shape[-2:]
        crop_draws, plan_draws = (self.generator(purpose, what, step) for what in ("crop", "plan"))
        groups = self._pairing_groups(N, len(images_NCHW))
        return BatchDraws(
            draw_crops(N, self.config, crop_draws),
            self.policies.plan(N, (height, width), plan_draws, groups),
            self.policies.weights(N, plan_draws),
            draw_centres(N * self.config.M, height, width, self.generator("cutout", step)),
            draw_mixing(self.config, height, width, self.generator("mixing", step).initial_seed()),
            groups,
        )

    def _pairing_groups(self, N: int, part: int) -> int:
        """Equal groups of a batch in which partners are found; a process that reads `part` of it sees no others.

        Groups of the largest size up to 8 that divides N are the same for any number of processes that does not cut
        them; where it does, each part is a group.
        """
        if self.split.resident:
            return 1
        size = max(size for size in range(1, 9) if N % size == 0)
        return N // size if size > 2 and part % size == 0 else N // part

    def augment(self, images_NCHW: Tensor, draws: BatchDraws, part: range, first: int = 0) -> Tensor:
        """The M copies of each image of `part` after crop, flip and policy, uint8 (len(part) * M, C, H, W).

        Where the policies mix a copy of V views, each view of the same crop is augmented, and the mixture is float32.
        images_NCHW: the images of the batch from number `first` on; those of `part` and their partners are among them.
        """
        M, V = self.config.M, self.policies.views
        start, stop = part.start * M * V, part.stop * M * V
        plan, outside = portion(draws.plan, start, stop)
        copies_B = torch.cat((torch.arange(start, stop), outside)) // V
        copies_BCHW = make_copies(images_NCHW, copies_B, M, draws.crops, first)
        own_BCHW, partners_BCHW = copies_BCHW.split((stop - start, len(outside)))
        augmented_BCHW = apply(own_BCHW, plan, partners_BCHW if len(outside) else None)
        if draws.weight_BV is None:
            return augmented_BCHW
        return mix(augmented_BCHW, draws.weight_BV[part.start * M : part.stop * M])


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Indices of the epoch's batches, all of one size: a remainder is left out, another one each epoch."""
    order = torch.randperm(images, generator=keyed_generator(seed, "order", epoch))
    return order[: images // batch_size * batch_size].split(batch_size)


def draw_crops(N: int, config: Config, generator: torch.Generator) -> Crops | None:
    """Crops of the M copies of N images, each copy's own or its image's; None where there is nothing to do."""
    if config.cropped_when_read or not (config.crop_padding or config.flip):
        return None
    M = config.M if config.crop_per_copy else 1
    shift_B2 = torch.randint(-config.crop_padding, config.crop_padding + 1, (N * M, 2), generator=generator)
    flipped_B1 = torch.randint(2, (N * M, 1), generator=generator).bool() & config.flip
    return Crops(*(drawn.repeat_interleave(config.M // M, 0) for drawn in (shift_B2, flipped_B1)))


def make_copies(images_NCHW: Tensor, copies_B: Tensor, M: int, crops: Crops | None, first: int = 0) -> Tensor:
    """The copies of the given numbers (copy m of image n is n * M + m), cropped and flipped.

    first: number of the image that images_NCHW begins with. crops: of all copies of the batch.
    """
    image_B = copies_B // M - first
    if crops is None:
        return images_NCHW.index_select(0, upload(image_B, images_NCHW.device))
    return crop_and_flip(images_NCHW, image_B, Crops(*(drawn[copies_B] for drawn in crops)))


def crop_and_flip(images_NCHW: Tensor, image_B: Tensor, crops: Crops) -> Tensor:
    """Of each image_B[b] a crop of the same size after zero padding, then a horizontal flip where that was drawn."""
    x_B1, y_B1 = crops.shift_B2.split(1, dim=1)
    y_BH = torch.arange(images_NCHW.shape[2]) + y_B1
    # The mirror image of a crop is a crop of the mirror image, from as far on the other side.
    return gather_rows(images_NCHW, image_B, y_BH, torch.where(crops.flipped_B1, -x_B1, x_B1), crops.flipped_B1[:, 0])


class Normalise:
    """Images of 0..255 to the network's float32: value / 255, minus the mean, over the standard deviation, by channel.

    Where a pixel is blanked, a negative value leaves -0.0, which is 0 to all that follows.
    """

    def __init__(self, config: Config, device: torch.device):
        usual = statistics(config.dataset)
        self.mean_C11 = torch.tensor(config.mean or usual[0], device=device)[:, None, None]
        self.std_C11 = torch.tensor(config.std or usual[1], device=device)[:, None, None]

    def __call__(self, images_BCHW: Tensor, kept_B1HW: Tensor | None = None) -> Tensor:
        """(B, C, H, W) in the channels_last memory format. kept_B1HW: 0 blanks a pixel, see `cutout_mask`."""
        inputs_BCHW = torch.empty_like(images_BCHW, dtype=torch.float32, memory_format=torch.channels_last)
        size = piece_size(images_BCHW)
        for start in range(0, len(images_BCHW), size):
            part = slice(start, start + size)
            values = images_BCHW[part].to(torch.float32, copy=True).div_(255).sub_(self.mean_C11).div_(self.std_C11)
            inputs_BCHW[part] = values if kept_B1HW is None else values.mul_(kept_B1HW[part])
        return inputs_BCHW


def draw_mixing(config: Config, height: int, width: int, seed: int) -> Mixing | None:
    """mixup (Zhang et al., 2018) or CutMix (Yun et al., 2019) for all copies of a step, as the config says."""
    alphas = [(name, alpha) for name, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)) if alpha]
    if not alphas:
        return None
    draws = random.Random(seed)
    name, alpha = draws.choice(alphas)
    share = draws.betavariate(alpha, alpha)
    if name == "mixup":
        return Mixing(share, None)
    return cutmix(share, draws.randrange(width), draws.randrange(height), height, width)


def cutmix(share: float, x: int, y: int, height: int, width: int) -> Mixing:
    """The other image's box around pixel (x, y), of 1 - share of the image's area, cut off at its border."""
    half = 0.5 * math.sqrt(1 - share)
    across, down = int(half * width), int(half * height)
    left, top, right, bottom = max(0, x - across), max(0, y - down), min(width, x + across), min(height, y + down)
    return Mixing(1 - (right - left) * (bottom - top) / (width * height), (left, top, right, bottom))


def mix_inputs(inputs_BCHW: Tensor, partner_BCHW: Tensor, mixing: Mixing) -> Tensor:
    """As torchvision.transforms.v2's MixUp and CutMix. Overwrites both."""
    if mixing.box is None:
        return inputs_BCHW.mul_(mixing.share).add_(partner_BCHW.mul_(1 - mixing.share))
    left, top, right, bottom = mixing.box
    inputs_BCHW[..., top:bottom, left:right] = partner_BCHW[..., top:bottom, left:right]
    return inputs_BCHW


def draw_centres(B: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """A random pixel (x, y) of each of B images, int64 (B, 2)."""
    x_B1 = torch.randint(width, (B, 1), generator=generator)
    y_B1 = torch.randint(height, (B, 1), generator=generator)
    return torch.cat((x_B1, y_B1), dim=1)


def cutout_mask(side: int, centre_B2: Tensor, height: int, width: int, device: torch.device) -> Tensor | None:
    """Cutout (DeVries and Taylor, 2017): float32 (B, 1, H, W), 0 in a square around the given pixel, 1 elsewhere.

    The square may reach over the border. side: in pixels; 0 blanks nothing: None.
    """
    if side == 0:
        return None
    x_B1, y_B1 = centre_B2.split(1, dim=1)
    column_BW = (torch.arange(width) < x_B1 - side // 2) | (torch.arange(width) >= x_B1 + (side + 1) // 2)
    row_BH = (torch.arange(height) < y_B1 - side // 2) | (torch.arange(height) >= y_B1 + (side + 1) // 2)
    column_BW, row_BH = (upload(outside, device).float() for outside in (column_BW, row_BH))
    return torch.maximum(row_BH[:, :, None], column_BW[:, None, :])[:, None]
