"""Augmentation of whole uint8 batches on the device they lie on: RandAugment or AutoAugment, then crop and flip.

What to do with each image is drawn on the CPU, for a whole epoch at once if wanted: the draws are then the same on
every device and for every number of processes, and how many images go to which operation is known without asking the
device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ltat_fast.data.image_ops import KERNELS, arguments
from ltat_fast.errors import UserError


class Crops(NamedTuple):
    """Where each image is cut out of its padded self, and whether it is mirrored; three tensors of one shape."""

    top: Tensor
    left: Tensor
    mirrored: Tensor


def draw_crops(n: int, pad: int, flip: bool, generator: torch.Generator) -> Crops:
    """Offsets uniform on 0..2*pad (int64) and mirroring (bool) with probability 1/2, or never when ``flip`` is off."""
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.randint(2, (n,), generator=generator).bool()
    return Crops(top, left, mirrored & flip)


def apply_crops(x: Tensor, pad: int, crops: Crops) -> Tensor:
    """Pad with zeros, cut each image back to its size at its own place, mirror it or not; (N, C, H, W), any dtype.

    ``crops`` holds N entries on the device of ``x``. One gather, with one index for all the channels of a pixel.
    """
    n, channels, height, width = x.shape
    padded = F.pad(x, (pad, pad, pad, pad)).flatten(2)
    rows = crops.top[:, None] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device)
    columns = crops.left[:, None] + torch.where(crops.mirrored[:, None], columns.flip(0), columns)
    pixels = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).flatten(1)[:, None]
    return padded.gather(2, pixels.expand(n, channels, height * width)).view(x.shape)


def crop_flip(x: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crop out of ``pad`` zeros a side and random horizontal mirroring of (N, C, H, W) images.

    ``generator`` is a CPU generator.
    """
    crops = draw_crops(len(x), pad, flip, generator)
    return apply_crops(x, pad, Crops(*(draw.to(x.device) for draw in crops)))


class Policy:
    """A list of operations, each with its magnitude, and a rule by which images draw one or more of them in turn.

    Args:
        operations: (name, magnitude) in torchvision's terms; ("Identity", 0) leaves the image alone
        draw: (n, CPU generator) -> int64 (n, rounds) on the CPU, positions in ``operations``
        height, width: of the images, which must have three channels
    """

    def __init__(
        self,
        operations: list[tuple[str, float]],
        draw: Callable[[int, torch.Generator], Tensor],
        height: int,
        width: int,
        device: torch.device | str,
    ) -> None:
        identity = len(KERNELS), [0.0] * 6
        rows = [identity if op[0] == "Identity" else arguments(*op, height, width) for op in operations]
        self.kernels = torch.tensor([kernel for kernel, _ in rows])
        self.arguments = torch.tensor([numbers for _, numbers in rows], dtype=torch.float64).to(device)
        self.draw = draw

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """uint8 (n, 3, H, W) on the policy's device, ``draws`` int64 (n, rounds) on the CPU; returns a new tensor.

        Each round gathers the images of one kernel, runs it once for all of them and scatters the results.
        """
        x = x.clone()
        for drawn in draws.unbind(1):
            kernels = self.kernels[drawn]
            order = kernels.argsort(stable=True)
            sizes = kernels.bincount(minlength=len(KERNELS) + 1).tolist()
            images, drawn = _upload(torch.stack([order, drawn[order]]), x.device)
            numbers = self.arguments[drawn]
            for kernel, index, row in zip(KERNELS, images.split(sizes), numbers.split(sizes), strict=False):
                if len(index):
                    x.index_copy_(0, index, kernel(x[index], row))
        return x


def rand_augment_policy(
    height: int, width: int, device: torch.device | str, num_ops: int = 2, magnitude: int = 8
) -> Policy:
    """RandAugment (Cubuk et al. 2020) as torchvision has it: fourteen operations, 31 magnitude bins, either sign."""
    names = ["Identity", *_RANGES, "Posterize", "Solarize", "AutoContrast", "Equalize"]
    magnitudes = [_magnitude(name, magnitude, 31, height, width) for name in names]
    # each operation with either sign, so that one uniform draw chooses both
    signed = [(name, sign * m) for name, m in zip(names, magnitudes, strict=True) for sign in _signs(name)]

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(signed), (n, num_ops), generator=generator)

    return Policy(signed, draw, height, width, device)


def auto_augment_policy(height: int, width: int, device: torch.device | str) -> Policy:
    """AutoAugment (Cubuk et al. 2019) with the policy learned on CIFAR-10: 25 pairs of operations, 10 bins."""
    operations = [("Identity", 0.0)]
    for pair in _CIFAR10_PAIRS:
        for name, _, level in pair:
            magnitude = _magnitude(name, level, 10, height, width)
            operations += [(name, sign * magnitude) for sign in _signs(name)]
    probability = torch.tensor([[p for _, p, _ in pair] for pair in _CIFAR10_PAIRS])

    def draw(n: int, generator: torch.Generator) -> Tensor:
        pair = torch.randint(len(_CIFAR10_PAIRS), (n,), generator=generator)
        happens = torch.rand(n, 2, generator=generator) < probability[pair]
        sign = torch.randint(2, (n, 2), generator=generator)
        return torch.where(happens, 1 + 4 * pair[:, None] + torch.tensor([0, 2]) + sign, 0)

    return Policy(operations, draw, height, width, device)


def rand_augment(x: Tensor, num_ops: int = 2, magnitude: int = 8, *, generator: torch.Generator) -> Tensor:
    """:func:`rand_augment_policy` on uint8 (N, 3, H, W); ``generator`` is a CPU generator."""
    return _apply_once(rand_augment_policy(*x.shape[2:], x.device, num_ops, magnitude), x, generator)


def auto_augment_cifar10(x: Tensor, *, generator: torch.Generator) -> Tensor:
    """:func:`auto_augment_policy` on uint8 (N, 3, H, W); ``generator`` is a CPU generator."""
    return _apply_once(auto_augment_policy(*x.shape[2:], x.device), x, generator)


POLICIES: dict[str, Callable[[int, int, torch.device | str], Policy]] = {
    "randaugment": rand_augment_policy,
    "autoaugment": auto_augment_policy,
}

_RANGES = {  # the largest magnitude, pixels as a share of the side; every one of these has a sign
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

_CIFAR10_PAIRS = [  # (operation, probability, magnitude bin), twice
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
    """Bin ``level`` of ``bins``, unsigned, in the single precision in which torchvision spaces them."""
    if name in _RANGES:
        top = _RANGES[name] * {"TranslateX": width, "TranslateY": height}.get(name, 1)
        return torch.linspace(0.0, top, bins)[level].item()
    if name == "Posterize":
        return round(8 - 4 * level / (bins - 1))
    if name == "Solarize":
        return torch.linspace(255.0, 0.0, bins)[level].item()
    return 0.0


def _signs(name: str) -> tuple[int, int]:
    return (1, -1) if name in _RANGES else (1, 1)


def _apply_once(policy: Policy, x: Tensor, generator: torch.Generator) -> Tensor:
    if x.shape[1] != 3:
        raise UserError(f"RandAugment and AutoAugment need colour images, these have {x.shape[1]} channel(s)")
    return policy.apply(x, policy.draw(len(x), generator))


def _upload(x: Tensor, device: torch.device) -> Tensor:
    """To ``device`` without waiting for the work queued there: from pinned memory where that matters."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
