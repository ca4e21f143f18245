"""Pre-activation residual networks (He et al. 2016b) and wide ones (Zagoruyko and Komodakis 2016)."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from .classifier import ImageClassifier, conv1x1, conv3x3


class PreActBlock(nn.Module):
    """Compute conv(relu(bn(conv a))) + shortcut with a = relu(bn x); the shortcut is x, or conv1x1 a for new shapes."""

    def __init__(self, in_width: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_width)
        self.conv1 = conv3x3(in_width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.act = nn.ReLU(inplace=True)
        changes_shape = stride != 1 or in_width != width
        self.shortcut = conv1x1(in_width, width, stride) if changes_shape else None

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.bn1(x))
        out = self.conv2(self.act(self.bn2(self.conv1(a))))
        return out + (x if self.shortcut is None else self.shortcut(a))


class PreActResNet(ImageClassifier):
    """A 3x3 convolution of width ``stem``, one stage of ``depth`` blocks per entry of ``widths``, then bn and relu.

    Every stage except the first halves the resolution.
    """

    def __init__(self, stem: int, widths: Sequence[int], depth: int, num_classes: int, in_channels: int):
        super().__init__(widths[-1], num_classes)
        self.conv1 = conv3x3(in_channels, stem)
        blocks = []
        in_width = stem
        for stage, width in enumerate(widths):
            for i in range(depth):
                blocks.append(PreActBlock(in_width, width, stride=2 if stage > 0 and i == 0 else 1))
                in_width = width
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(in_width)
        self.act = nn.ReLU(inplace=True)

    def feature_maps(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.blocks(self.conv1(x))))


def preactresnet18(num_classes: int, in_channels: int) -> PreActResNet:
    return PreActResNet(64, (64, 128, 256, 512), 2, num_classes, in_channels)


def wrn_34_10(num_classes: int, in_channels: int) -> PreActResNet:
    """WRN-34-10: (34 - 4) / 6 = 5 blocks per stage, widths 10 * (16, 32, 64), no dropout, authors' initialisation."""
    model = PreActResNet(16, (160, 320, 640), 5, num_classes, in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    nn.init.zeros_(model.fc.bias)
    return model
