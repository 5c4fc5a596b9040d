"""Data sets and what every image goes through besides the policy: crop and flip before it, normalise and Cutout after.

Small sets stay on the device as uint8; a batch is an index. ImageNet's images are cropped as worker processes decode
them. The order of the images and all draws are keyed by (seed, purpose, epoch or step) for the whole batch: a resumed
run sees what an uninterrupted one would have seen, and several processes see what one would.

Shape suffixes: N distinct images of a batch, M copies of each; B = N * M, image-major (copy m of image n stands at
n * M + m); C channels, H rows, W columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from augmentations import gather_rows, piece_size, upload
from config import Config
from utils import keyed_generator

# Mean and standard deviation of red, green and blue. CIFAR's are those that the paper's line of work uses.
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Indices of the epoch's batches, all of one size: a remainder is left out, another one each epoch."""
    order = torch.randperm(images, generator=keyed_generator(seed, "order", epoch))
    return order[: images // batch_size * batch_size].split(batch_size)


class Crops(NamedTuple):
    """For each of B copies, where it lies in the zero-padded image (x and y in pixels), and whether it is mirrored."""

    shift_B2: Tensor
    flipped_B1: Tensor


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
        usual = CIFAR_STATISTICS if config.dataset.startswith("cifar") else IMAGENET_STATISTICS
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
