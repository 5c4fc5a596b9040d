"""Augmentations as they were published, drawn for each image by itself, in the batched engine.

Shape suffixes: N distinct images of a batch, M copies of each, B = N * M, image-major; V views of a copy; K positions
of a plan; C channels, but for logits_BC, where C counts classes; H, W rows and columns.
"""

from torch import Tensor


def mix(views_BCHW: Tensor, weight_BV: Tensor, kept_B1HW: Tensor | None) -> Tensor:
    raise NotImplementedError


def augmix_loss(loss_B: Tensor, logits_BC: Tensor, M: int, jsd: float) -> Tensor:
    raise NotImplementedError
