"""ResNets for 224x224 images, on torchvision's ResNet: https://arxiv.org/abs/1512.03385, with the stride in the 3x3
convolution of a bottleneck ("v1.5").

resnet18 to resnet200 have torchvision's state-dict keys; resnet50d has timm's, which extend them.
"""

from collections.abc import Iterable

from torch import nn

BASIC = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def resnet(num_classes: int, *, depth: int = 50) -> nn.Module:
    """ResNet-18, -34, -50, -101, -152 or -200. Raises ValueError for another depth."""
    _check_depth(depth, BASIC | BLOCKS)
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet  # takes seconds to import

    if depth in BASIC:
        return ResNet(BasicBlock, BASIC[depth], num_classes=num_classes)
    return ResNet(Bottleneck, BLOCKS[depth], num_classes=num_classes)


def resnet_d(num_classes: int, *, depth: int = 50) -> nn.Module:
    """ResNet-D (He et al., 2019), https://arxiv.org/abs/1812.01187: three 3x3 convolutions of 32, 32 and 64 channels in
    place of the 7x7, and average pooling in place of strides in the shortcuts. Raises ValueError for a depth without
    bottlenecks.
    """
    _check_depth(depth, BLOCKS)
    model = resnet(num_classes, depth=depth)
    model.conv1 = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(inplace=True),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
    )
    for module in model.conv1:
        if isinstance(module, nn.Conv2d):  # as torchvision initialises the others
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        block = stage[0]
        conv, norm = block.downsample
        pool = nn.AvgPool2d(2, block.stride, ceil_mode=True, count_include_pad=False)
        conv.stride = (1, 1)
        block.downsample = nn.Sequential(pool if block.stride > 1 else nn.Identity(), conv, norm)
    return model


def _check_depth(depth: int, known: Iterable[int]) -> None:
    if depth not in known:
        raise ValueError(f"the depth of a ResNet is {', '.join(map(str, known))}, not {depth}")
