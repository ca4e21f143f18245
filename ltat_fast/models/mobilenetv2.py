"""MobileNetV2 (Sandler et al. 2018) in the version of the CIFAR literature: stem of stride 1, relu instead of relu6."""

from torch import Tensor, nn

from .classifier import ImageClassifier, conv1x1, conv3x3

STAGES = (  # expansion, width, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM, HEAD = 32, 1280


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3 depthwise), project (1x1, no relu).

    Blocks of stride 1 add a shortcut: the identity, or bn(conv1x1) if the width changes.
    """

    def __init__(self, in_width: int, width: int, expansion: int, stride: int):
        super().__init__()
        hidden = expansion * in_width
        self.expand, self.bn1 = conv1x1(in_width, hidden), nn.BatchNorm2d(hidden)
        self.depthwise, self.bn2 = conv3x3(hidden, hidden, stride, groups=hidden), nn.BatchNorm2d(hidden)
        self.project, self.bn3 = conv1x1(hidden, width), nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride == 1 and in_width == width:
            self.shortcut = nn.Identity()
        elif stride == 1:
            self.shortcut = nn.Sequential(conv1x1(in_width, width), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.expand(x)))
        out = self.act(self.bn2(self.depthwise(out)))
        out = self.bn3(self.project(out))
        return out if self.shortcut is None else out + self.shortcut(x)


class MobileNetV2(ImageClassifier):
    def __init__(self, num_classes: int, in_channels: int):
        super().__init__(HEAD, num_classes)
        self.conv1, self.bn1 = conv3x3(in_channels, STEM), nn.BatchNorm2d(STEM)
        blocks = []
        in_width = STEM
        for expansion, width, depth, stride in STAGES:
            for i in range(depth):
                blocks.append(InvertedResidual(in_width, width, expansion, stride if i == 0 else 1))
                in_width = width
        self.blocks = nn.Sequential(*blocks)
        self.conv2, self.bn2 = conv1x1(in_width, HEAD), nn.BatchNorm2d(HEAD)
        self.act = nn.ReLU(inplace=True)

    def feature_maps(self, x: Tensor) -> Tensor:
        out = self.blocks(self.act(self.bn1(self.conv1(x))))
        return self.act(self.bn2(self.conv2(out)))
