"""Pre-activation ResNets for small images (He et al., 2016), https://arxiv.org/abs/1603.05027.

As in RobustBench's PreAct-ResNet-18 of Kireev et al. (2021), with its state-dict keys: four stages of basic blocks, the
shortcuts' 1x1 convolutions take the activated input, and BatchNorm and ReLU come before the pooling.
"""

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


def preactresnet(num_classes: int, *, depth: int = 18) -> nn.Module:
    """PreAct-ResNet-18 or -34. Raises ValueError for another depth."""
    if depth not in BLOCKS:
        raise ValueError(f"the depth of a PreAct-ResNet is {', '.join(map(str, BLOCKS))}, not {depth}")
    return PreActResNet(BLOCKS[depth], num_classes)


class PreActResNet(nn.Module):
    def __init__(self, blocks: tuple[int, ...], num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(64, 64, blocks[0], stride=1)
        self.layer2 = _stage(64, 128, blocks[1], stride=2)
        self.layer3 = _stage(128, 256, blocks[2], stride=2)
        self.layer4 = _stage(256, 512, blocks[3], stride=2)
        self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(F.relu(self.bn(x)).mean((2, 3)))


class PreActBlock(nn.Module):
    """shortcut + BN-ReLU-conv3x3(stride)-BN-ReLU-conv3x3."""

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = None
        if stride > 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.bn1(x))
        residual = self.conv2(F.relu(self.bn2(self.conv1(activated))))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _stage(channels_in: int, channels_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = PreActBlock(channels_in, channels_out, stride)
    return nn.Sequential(first, *(PreActBlock(channels_out, channels_out, 1) for _ in range(blocks - 1)))
