"""PyramidNet (Han et al., 2017), https://arxiv.org/abs/1610.02915, with ShakeDrop (Yamada et al., 2018),
https://arxiv.org/abs/1802.02375.

Channels grow by alpha / blocks from block to block. ShakeDrop's gate, alpha and beta are drawn per image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.noise import scale_apart, uniform_per_image

LAST_SURVIVAL = 0.5  # p_L: probability of no noise in the last block; it falls linearly from 1


def pyramidnet(num_classes: int, *, depth: int = 272, alpha: int = 200, bottleneck: bool = True) -> nn.Module:
    """PyramidNet-depth with widening factor alpha, of bottleneck blocks or of basic ones.

    Raises ValueError unless depth is 9n + 2 (bottleneck) or 6n + 2 (basic), to 2,000, and alpha 1 to 10,000.
    """
    layers = 9 if bottleneck else 6
    if not layers + 2 <= depth <= 2_000 or (depth - 2) % layers:
        raise ValueError(f"the depth of this PyramidNet is {layers}n + 2 ({layers + 2}, {2 * layers + 2}), not {depth}")
    if not 1 <= alpha <= 10_000:
        raise ValueError(f"the alpha of a PyramidNet is 1 to 10000, not {alpha}")
    return PyramidNet((depth - 2) // layers, alpha, bottleneck, num_classes)


class PyramidNet(nn.Module):
    def __init__(self, blocks_per_stage: int, alpha: int, bottleneck: bool, num_classes: int):
        super().__init__()
        blocks = 3 * blocks_per_stage
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        block, channels_in = PyramidBottleneck if bottleneck else PyramidBasic, 16
        built = []
        for number in range(1, blocks + 1):
            starts_stage = number > 1 and number % blocks_per_stage == 1 % blocks_per_stage
            survival = 1 - number / blocks * (1 - LAST_SURVIVAL)
            planes = round(16 + alpha * number / blocks)
            built.append(block(channels_in, planes, 2 if starts_stage else 1, survival))
            channels_in = built[-1].channels_out
        self.blocks = nn.Sequential(*built)
        self.norm = nn.BatchNorm2d(channels_in)
        self.classifier = nn.Linear(channels_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * channels out)))
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class PyramidBlock(nn.Module):
    """shortcut + ShakeDrop(residual), without a ReLU after the sum; subclasses define the residual.

    The shortcut halves the image by average pooling where the residual has stride 2, and appends channels of zeros.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, survival: float, residual: nn.Sequential):
        super().__init__()
        self.channels_out, self.stride = channels_out, stride
        self.more_channels = channels_out - channels_in
        self.residual = residual
        self.shakedrop = ShakeDrop(survival)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.stride == 1 else F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(skip, (0, 0, 0, 0, 0, self.more_channels)) + self.shakedrop(self.residual(x))


class PyramidBottleneck(PyramidBlock):
    """BN-conv1x1-BN-ReLU-conv3x3(stride)-BN-ReLU-conv1x1-BN, with four times as many channels out as inside."""

    def __init__(self, channels_in: int, planes: int, stride: int, survival: float):
        residual = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
            nn.BatchNorm2d(4 * planes),
        )
        super().__init__(channels_in, 4 * planes, stride, survival, residual)


class PyramidBasic(PyramidBlock):
    """BN-conv3x3(stride)-BN-ReLU-conv3x3-BN."""

    def __init__(self, channels_in: int, planes: int, stride: int, survival: float):
        residual = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.Conv2d(channels_in, planes, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(),
            nn.Conv2d(planes, planes, 3, padding=1, bias=False),
            nn.BatchNorm2d(planes),
        )
        super().__init__(channels_in, planes, stride, survival, residual)


class ShakeDrop(nn.Module):
    """(b + alpha - b * alpha) * x, with beta in place of alpha in the gradient.

    Drawn per image in training: gate b ~ Bernoulli(survival), alpha ~ U[-1, 1], beta ~ U[0, 1]. In evaluation the
    factor is its expectation, `survival`.
    """

    def __init__(self, survival: float):
        super().__init__()
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.survival * x
        undisturbed = uniform_per_image(x) < self.survival
        alpha, beta = uniform_per_image(x, -1.0, 1.0), uniform_per_image(x)
        return scale_apart(x, torch.where(undisturbed, 1.0, alpha), torch.where(undisturbed, 1.0, beta))

    def extra_repr(self) -> str:
        return f"survival={self.survival:.4f}"
