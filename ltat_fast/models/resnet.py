"""Residual networks (He et al. 2016a) for small images: a 3x3 stem of stride 1, without pooling."""

from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier, conv1x1, conv3x3


class BasicBlock(nn.Module):
    """Compute relu(bn(conv(relu(bn(conv x)))) + shortcut x); the shortcut is x, or bn(conv1x1 x) for a new shape."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_width != width:
            self.shortcut = nn.Sequential(conv1x1(in_width, width, stride), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        return self.act(out)


class ResNet(ImageClassifier):
    """A stem of width ``widths[0]``, then one stage of ``depth`` basic blocks per entry of ``widths``.

    Every stage except the first halves the resolution.
    """

    def __init__(self, widths: Sequence[int], depth: int, num_classes: int, in_channels: int):
        super().__init__(widths[-1], num_classes)
        self.conv1 = conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act = nn.ReLU(inplace=True)
        blocks = []
        in_width = widths[0]
        for stage, width in enumerate(widths):
            for i in range(depth):
                blocks.append(BasicBlock(in_width, width, stride=2 if stage > 0 and i == 0 else 1))
                in_width = width
        self.blocks = nn.Sequential(*blocks)

    def feature_maps(self, x: Tensor) -> Tensor:
        return self.blocks(self.act(self.bn1(self.conv1(x))))


def resnet18(num_classes: int, in_channels: int) -> ResNet:
    return ResNet((64, 128, 256, 512), 2, num_classes, in_channels)


def smallresnet(num_classes: int, in_channels: int) -> ResNet:
    """A ResNet with seven 3x3 convolutions and 78,000 parameters, for the 8x8 digits, quick tests and CPU demos."""
    return ResNet((16, 32, 64), 1, num_classes, in_channels)
