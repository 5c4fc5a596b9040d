"""The other networks of AugMix's CIFAR table (Hendrycks et al., ICLR 2020), beside its WRN-40-2.

Each as in its authors' code: AllConv and ResNeXt with its state-dict keys, DenseNet-BC on torchvision's DenseNet.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def allconv(num_classes: int, *, dropout: float = 0.5) -> nn.Module:
    """All-convolutional network (Springenberg et al., 2015), https://arxiv.org/abs/1412.6806, with BatchNorm and GELU.

    dropout: after the two poolings.
    """
    layers: list[nn.Module] = []
    for channels_in, channels in ((3, 96), (96, 192)):
        layers += [*_convolution(channels_in, channels), *_convolution(channels, channels)]
        layers += [*_convolution(channels, channels), nn.MaxPool2d(2), nn.Dropout(dropout)]
    layers += [*_convolution(192, 192, padding=0), *_convolution(192, 192, kernel=1), *_convolution(192, 192, kernel=1)]
    return AllConv(nn.Sequential(*layers), num_classes)


class AllConv(nn.Module):
    def __init__(self, features: nn.Sequential, num_classes: int):
        super().__init__()
        self.features = features
        self.classifier = nn.Linear(192, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        # The padding of the two 1x1 convolutions leaves 10x10 pixels of an image of 32x32; 8x8 are averaged.
        return self.classifier(self.features(x)[..., :-2, :-2].mean((2, 3)))


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), an approximation of the GELU."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


def _convolution(channels_in: int, channels: int, *, kernel: int = 3, padding: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, kernel, padding=padding), nn.BatchNorm2d(channels), QuickGELU()]


def resnext(num_classes: int, *, depth: int = 29, cardinality: int = 4, width: int = 32) -> nn.Module:
    """ResNeXt for small images (Xie et al., 2017), https://arxiv.org/abs/1611.05431, with `cardinality` groups in the
    3x3 convolutions, of `width` channels each in the first stage. Raises ValueError unless depth is 9n + 2, to 2,000,
    and the others 1 to 1000.

    The network that AugMix's authors call ResNeXt-29 (32x4) has 4 groups of 32 channels.
    """
    if not 11 <= depth <= 2_000 or (depth - 2) % 9:
        raise ValueError(f"the depth of a ResNeXt is 9n + 2 (11, 20, 29, ...), not {depth}")
    for name, number in (("cardinality", cardinality), ("width", width)):
        if not 1 <= number <= 1000:
            raise ValueError(f"the {name} of a ResNeXt is 1 to 1000, not {number}")
    return ResNeXt((depth - 2) // 9, cardinality, width, num_classes)


class ResNeXt(nn.Module):
    def __init__(self, blocks: int, cardinality: int, width: int, num_classes: int):
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        channels_in, stages = 64, []
        for stage in range(3):
            inside, channels_out = cardinality * width * 2**stage, 256 * 2**stage
            built = []
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                built.append(ResNeXtBlock(channels_in, inside, channels_out, cardinality, stride))
                channels_in = channels_out
            stages.append(nn.Sequential(*built))
        self.stage_1, self.stage_2, self.stage_3 = stages
        self.classifier = nn.Linear(channels_in, num_classes)
        _initialise(self)
        nn.init.kaiming_normal_(self.classifier.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        return self.classifier(self.stage_3(self.stage_2(self.stage_1(x))).mean((2, 3)))


class ResNeXtBlock(nn.Module):
    """ReLU(shortcut + conv1x1-BN-ReLU-grouped conv3x3(stride)-BN-ReLU-conv1x1-BN)."""

    def __init__(self, channels_in: int, inside: int, channels_out: int, cardinality: int, stride: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels_in, inside, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inside)
        self.conv_conv = nn.Conv2d(inside, inside, 3, stride, padding=1, groups=cardinality, bias=False)
        self.bn = nn.BatchNorm2d(inside)
        self.conv_expand = nn.Conv2d(inside, channels_out, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(channels_out)
        self.downsample = None
        if channels_in != channels_out:
            shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.bn_reduce(self.conv_reduce(x)))
        residual = self.bn_expand(self.conv_expand(F.relu(self.bn(self.conv_conv(inside)))))
        return F.relu(residual + (x if self.downsample is None else self.downsample(x)))


def densenet(num_classes: int, *, depth: int = 100, growth: int = 12) -> nn.Module:
    """DenseNet-BC for small images (Huang et al., 2017), https://arxiv.org/abs/1608.06993.

    Raises ValueError unless depth is 6n + 4, to 2,000, and growth 1 to 1000.
    """
    if not 10 <= depth <= 2_000 or (depth - 4) % 6:
        raise ValueError(f"the depth of a DenseNet is 6n + 4 (10, 16, 22, ...), not {depth}")
    if not 1 <= growth <= 1000:
        raise ValueError(f"the growth of a DenseNet is 1 to 1000, not {growth}")
    from torchvision.models.densenet import DenseNet  # takes seconds to import

    model = DenseNet(growth, ((depth - 4) // 6,) * 3, num_init_features=2 * growth, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):  # of the stem for large images
        delattr(model.features, name)
    _initialise(model)
    return model


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # N(0, sqrt(2 / (k * k * channels out)))
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    nn.init.zeros_(model.classifier.bias)
