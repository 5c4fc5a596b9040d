"""Wide residual networks (Zagoruyko and Komodakis, 2016), https://arxiv.org/abs/1605.07146, as first published.

No bias in convolutions, the stride in a block's first convolution, and the first BN-ReLU shared with the 1x1 shortcut
wherever a block changes the number of channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn


def wideresnet(num_classes: int, *, depth: int = 28, width: int = 10, dropout: float = 0.0) -> nn.Module:
    """WRN-depth-width. Raises ValueError unless depth is 6n + 4, from 10 to 2,000, and width 1 to 1,000."""
    if not 10 <= depth <= 2_000 or (depth - 4) % 6:
        raise ValueError(f"the depth of a wide ResNet is 6n + 4 (10, 16, 22, 28, 40, ...), not {depth}")
    if not 1 <= width <= 1000:
        raise ValueError(f"the width of a wide ResNet is 1 to 1000, not {width}")
    return WideResNet((depth - 4) // 6, width, num_classes, dropout)


class WideResNet(nn.Module):
    def __init__(self, blocks: int, width: int, num_classes: int, dropout: float):
        super().__init__()
        channels = (16, 16 * width, 32 * width, 64 * width)
        self.stem = nn.Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.groups = nn.Sequential(
            *(
                nn.Sequential(
                    PreActBlock(channels[g], channels[g + 1], stride, dropout),
                    *(PreActBlock(channels[g + 1], channels[g + 1], 1, dropout) for _ in range(blocks - 1)),
                )
                for g, stride in enumerate((1, 2, 2))
            )
        )
        self.norm = nn.BatchNorm2d(channels[-1])
        self.classifier = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.groups(self.stem(x))))
        return self.classifier(x.mean((2, 3)))


class PreActBlock(nn.Module):
    """BN-ReLU-conv3x3(stride)-BN-ReLU-[dropout]-conv3x3, plus the shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.dropout = dropout
        changes = stride != 1 or channels_in != channels_out
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(activated)
        residual = F.relu(self.norm2(self.conv1(activated)))
        residual = F.dropout(residual, self.dropout, self.training)
        return skip + self.conv2(residual)
