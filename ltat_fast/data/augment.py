"""Augmentation of uint8 image batches on the device that holds them: RandAugment or AutoAugment, then crop and flip.

All random choices are drawn on the CPU, for a whole epoch at once. So they are the same on every device and for every
number of processes, and the number of images per operation is known without waiting for the device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltat_fast.data.image_ops import KERNELS, kernel_arguments

RAND_AUGMENT_OPS = 2
"""operations per image in RandAugment"""
RAND_AUGMENT_MAGNITUDE = 8
"""magnitude bin of RandAugment, out of 31 bins"""


class Crops(NamedTuple):
    """Random crops and flips, one per image: three tensors of shape (N,)."""

    top: Tensor
    """int64, first row of the crop in the padded image"""
    left: Tensor
    """int64, first column of the crop in the padded image"""
    flipped: Tensor
    """bool, whether the crop is flipped horizontally"""


def draw_crops(n: int, slack: int, flip: bool, generator: torch.Generator) -> Crops:
    """Draw crops for ``n`` images: offsets uniform on 0..slack, and a flip with probability 1/2 if ``flip`` is set.

    ``generator`` is a CPU generator, and the result is on the CPU.
    """
    top, left = torch.randint(slack + 1, (2, n), generator=generator)
    if flip:
        flipped = torch.randint(2, (n,), generator=generator).bool()
    else:
        flipped = torch.zeros(n, dtype=torch.bool)
    return Crops(top, left, flipped)


def apply_crops(x: Tensor, pad: int, crops: Crops, size: int | None = None) -> Tensor:
    """Pad images (N, C, H, W) of any dtype with ``pad`` zeros per side, crop each to ``size`` (H, W if None), flip it.

    ``crops`` holds N entries on the device of ``x``. The whole batch is one gather, with one index per pixel for all
    channels.
    """
    n, channels, stored_height, stored_width = x.shape
    height, width = (stored_height, stored_width) if size is None else (size, size)
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    rows = crops.top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = crops.left[:, None] + torch.where(crops.flipped[:, None], columns.flip(0), columns)
    pixels = (rows[:, :, None] * (stored_width + 2 * pad) + columns[:, None, :]).flatten(1)[:, None]
    return padded.gather(2, pixels.expand(n, channels, height * width)).view(n, channels, height, width)


class Policy:
    """A list of image operations with magnitudes, and a rule by which each image draws one or more of them.

    Args:
        operations: (name, magnitude) in torchvision's terms; ("Identity", 0.0) leaves the image unchanged
        draw: takes (n, CPU generator), returns int64 (n, rounds) on the CPU: positions in ``operations``; the
            operations in row i are applied to image i from left to right
        height, width: size of the images, which must have three channels
        device: device of the images
    """

    def __init__(
        self,
        operations: list[tuple[str, float]],
        draw: Callable[[int, torch.Generator], Tensor],
        height: int,
        width: int,
        device: torch.device | str,
    ) -> None:
        identity = len(KERNELS), [0.0] * 6  # one past the last kernel
        rows = [
            identity if name == "Identity" else kernel_arguments(name, magnitude, height, width)
            for name, magnitude in operations
        ]
        self.kernels = torch.tensor([kernel for kernel, _ in rows])
        self.arguments = torch.tensor([arguments for _, arguments in rows], dtype=torch.float64).to(device)
        self.draw = draw

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Apply the drawn operations to a copy of ``x``.

        Each round gathers the images of one kernel, runs the kernel once for all of them, and scatters the results.

        Args:
            x: uint8 (n, 3, H, W) on the policy's device
            draws: int64 (n, rounds) on the CPU, from :attr:`draw`
        """
        x = x.clone()
        for positions in draws.unbind(1):
            kernels = self.kernels[positions]
            order = kernels.argsort(stable=True)
            sizes = kernels.bincount(minlength=len(KERNELS) + 1).tolist()
            images, positions = _upload(torch.stack([order, positions[order]]), x.device)
            groups = zip(images.split(sizes), self.arguments[positions].split(sizes), strict=True)
            for kernel, (index, arguments) in zip(KERNELS, groups, strict=False):  # the last group is Identity
                if len(index):
                    x.index_copy_(0, index, kernel(x[index], arguments))
        return x


def rand_augment_policy(height: int, width: int, device: torch.device | str) -> Policy:
    """Make the policy of RandAugment (Cubuk et al. 2020) in torchvision's version: 14 operations, 31 magnitude bins.

    Each of :data:`RAND_AUGMENT_OPS` rounds draws one operation uniformly, and a sign if the operation has one.
    """
    names = ["Identity", *_MAX_MAGNITUDES, "Posterize", "Solarize", "AutoContrast", "Equalize"]
    operations = []
    for name in names:  # two entries per operation, so that one uniform draw chooses operation and sign
        operations += _both_signs(name, _magnitude(name, RAND_AUGMENT_MAGNITUDE, 31, height, width))

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(operations), (n, RAND_AUGMENT_OPS), generator=generator)

    return Policy(operations, draw, height, width, device)


def auto_augment_policy(height: int, width: int, device: torch.device | str) -> Policy:
    """Make the policy of AutoAugment (Cubuk et al. 2019) learned on CIFAR-10: 25 pairs of operations, 10 bins."""
    operations = [("Identity", 0.0)]
    for pair in _CIFAR10_PAIRS:  # four entries per pair: first operation with either sign, then the second
        for name, _, level in pair:
            operations += _both_signs(name, _magnitude(name, level, 10, height, width))
    probability = torch.tensor([[p for _, p, _ in pair] for pair in _CIFAR10_PAIRS])

    def draw(n: int, generator: torch.Generator) -> Tensor:
        pair = torch.randint(len(_CIFAR10_PAIRS), (n,), generator=generator)
        applied = torch.rand(n, 2, generator=generator) < probability[pair]
        sign = torch.randint(2, (n, 2), generator=generator)
        return torch.where(applied, 1 + 4 * pair[:, None] + torch.tensor([0, 2]) + sign, 0)

    return Policy(operations, draw, height, width, device)


POLICIES: dict[str, Callable[[int, int, torch.device | str], Policy]] = {
    "randaugment": rand_augment_policy,
    "autoaugment": auto_augment_policy,
}

_MAX_MAGNITUDES = {  # the operations whose magnitude has a sign; translation is a fraction of the image side
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331,
    "TranslateY": 150 / 331,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}

_CIFAR10_PAIRS = [  # each pair: two of (operation, probability, magnitude bin)
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
]


def _magnitude(name: str, level: int, bins: int, height: int, width: int) -> float:
    """Return the unsigned magnitude in bin ``level`` of ``bins``, spaced in float32 as in torchvision."""
    if name in _MAX_MAGNITUDES:
        largest = _MAX_MAGNITUDES[name]
        if name == "TranslateX":
            largest *= width
        elif name == "TranslateY":
            largest *= height
        return torch.linspace(0.0, largest, bins)[level].item()
    if name == "Posterize":
        return round(8 - 4 * level / (bins - 1))
    if name == "Solarize":
        return torch.linspace(255.0, 0.0, bins)[level].item()
    return 0.0


def _both_signs(name: str, magnitude: float) -> list[tuple[str, float]]:
    """Return the operation once with each sign, or twice the same operation if it has no sign."""
    return [(name, magnitude), (name, -magnitude if name in _MAX_MAGNITUDES else magnitude)]


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy to ``device`` without waiting for the work queued there, which on CUDA needs pinned memory."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
