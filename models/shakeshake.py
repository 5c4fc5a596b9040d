"""Shake-Shake networks (Gastaldi, 2017), https://arxiv.org/abs/1705.07485, as first published ("Shake-Shake-Image").

A stem convolution with BN and no ReLU, ReLU before the two-path shortcut, and none after a block's sum. The first
publication's code pads the shortcut's second path at the top and left; some later ones crop there instead.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.noise import scale_apart, uniform_per_image


def shakeshake(num_classes: int, *, depth: int = 26, width: int = 32) -> nn.Module:
    """Shake-Shake depth 2x<width>d. Raises ValueError unless depth is 6n + 2, to 2,000, and width even, to 10,000."""
    if not 8 <= depth <= 2_000 or (depth - 2) % 6:
        raise ValueError(f"the depth of a Shake-Shake network is 6n + 2 (8, 14, 20, 26, ...), not {depth}")
    if not 2 <= width <= 10_000 or width % 2:
        raise ValueError(f"the width of a Shake-Shake network is even, 2 to 10000, not {width}")
    return ShakeShake((depth - 2) // 6, width, num_classes)


class ShakeShake(nn.Module):
    def __init__(self, blocks: int, width: int, num_classes: int):
        super().__init__()
        channels = (16, width, 2 * width, 4 * width)
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]))
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    ShakeBlock(channels[s], channels[s + 1], stride),
                    *(ShakeBlock(channels[s + 1], channels[s + 1], 1) for _ in range(blocks - 1)),
                )
                for s, stride in enumerate((1, 2, 2))
            )
        )
        self.classifier = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * channels out)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stages(self.stem(x)))
        return self.classifier(x.mean((2, 3)))


class ShakeBlock(nn.Module):
    """skip + alpha * branch 1 + (1 - alpha) * branch 2.

    In training alpha ~ U(0, 1) per image, with another beta ~ U(0, 1) in its place in the gradient; in evaluation 1/2.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.branch1 = _branch(channels_in, channels_out, stride)
        self.branch2 = _branch(channels_in, channels_out, stride)
        self.shortcut = TwoPathShortcut(channels_in, channels_out, stride) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        branch1, branch2 = self.branch1(x), self.branch2(x)
        if not self.training:
            return skip + 0.5 * (branch1 + branch2)
        alpha, beta = uniform_per_image(x), uniform_per_image(x)
        return skip + scale_apart(branch1, alpha, beta) + scale_apart(branch2, 1 - alpha, 1 - beta)


class TwoPathShortcut(nn.Module):
    """ReLU, every stride-th pixel through one 1x1 convolution and its upper left neighbour through another, BN."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.path1 = nn.Conv2d(channels_in, channels_out // 2, 1, stride, bias=False)
        self.path2 = nn.Conv2d(channels_in, channels_out // 2, 1, stride, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        shifted = F.pad(x, (1, -1, 1, -1))
        return self.norm(torch.cat((self.path1(x), self.path2(shifted)), dim=1))


def _branch(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
    )
