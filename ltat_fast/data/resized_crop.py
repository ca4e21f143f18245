"""Random crops of random size and shape, resized to one size on the device: torchvision's RandomResizedCrop in batches.

The resampling is bilinear with antialiasing. It is linear and separable, so that a batch is two products with one
matrix per image for the rows and one for the columns. A flip reverses the rows of the second matrix.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SCALE = (0.08, 1.0)
"""smallest and largest share of the image that a crop covers (Szegedy et al. 2015, torchvision's default)"""
RATIO = (3 / 4, 4 / 3)
"""smallest and largest width / height of a crop"""
ATTEMPTS = 10
"""draws per image; if none fits into the image, the largest centred crop with a ratio in :data:`RATIO` is used"""


class ResizedCrops(NamedTuple):
    """Random crops and flips, one per image: five tensors of shape (N,)."""

    top: Tensor
    """int64, first row"""
    left: Tensor
    """int64, first column"""
    height: Tensor
    """int64, number of rows"""
    width: Tensor
    """int64, number of columns"""
    flipped: Tensor
    """bool, whether the crop is flipped horizontally"""


def draw_resized_crops(n: int, height: int, width: int, flip: bool, generator: torch.Generator) -> ResizedCrops:
    """Draw crops of ``n`` images of ``height`` x ``width`` pixels, with the distribution of torchvision.

    ``generator`` is a CPU generator, and the result is on the CPU.
    """
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    largest = (min(height, round(width / ratio)), min(width, round(height * ratio)))
    rows, columns = (torch.full((n,), side) for side in largest)
    undecided = torch.ones(n, dtype=torch.bool)
    for _ in range(ATTEMPTS):
        area = height * width * torch.empty(n).uniform_(*SCALE, generator=generator)
        shape = torch.empty(n).uniform_(math.log(RATIO[0]), math.log(RATIO[1]), generator=generator).exp()
        tried_columns, tried_rows = (area * shape).sqrt().round().long(), (area / shape).sqrt().round().long()
        fits = (tried_columns > 0) & (tried_columns <= width) & (tried_rows > 0) & (tried_rows <= height)
        rows = torch.where(undecided & fits, tried_rows, rows)
        columns = torch.where(undecided & fits, tried_columns, columns)
        undecided &= ~fits
    # A uniform number in [0, 1) times the number of places, as float64 so that it never rounds up to that number.
    places = torch.rand(2, n, generator=generator, dtype=torch.float64)
    top = (places[0] * (height - rows + 1)).long()
    left = (places[1] * (width - columns + 1)).long()
    top = torch.where(undecided, (height - rows) // 2, top)
    left = torch.where(undecided, (width - columns) // 2, left)
    flipped = torch.randint(2, (n,), generator=generator).bool() if flip else torch.zeros(n, dtype=torch.bool)
    return ResizedCrops(top, left, rows, columns, flipped)


def apply_resized_crops(x: Tensor, size: int, crops: ResizedCrops) -> Tensor:
    """Crop each image, resize the crops to ``size`` x ``size`` and flip them.

    Args:
        x: uint8 (n, C, H, W)
        crops: n crops, on the device of ``x``

    Returns:
        uint8 (n, C, size, size). Sums are rounded once, so that a value can differ by one from Pillow's, which rounds
        after the columns and after the rows.
    """
    rows = _weights(crops.top, crops.height, x.shape[2], size)
    columns = _weights(crops.left, crops.width, x.shape[3], size)
    columns = torch.where(crops.flipped[:, None, None], columns.flip(1), columns)
    resized = torch.einsum("nchw,njw->nchj", x.float(), columns)
    resized = torch.einsum("nih,nchj->ncij", rows, resized)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _weights(start: Tensor, length: Tensor, stored: int, size: int) -> Tensor:
    """Return the weights of ``stored`` pixels in each of ``size`` resized pixels, float32 (n, size, stored).

    start, length: int64 (n,), the part of the stored pixels that is resized.
    """
    first, length = start[:, None].float(), length[:, None].float()
    scale = length / size
    centre = first + (torch.arange(size, device=start.device) + 0.5) * scale
    pixel = torch.arange(stored, device=start.device) + 0.5
    distance = (pixel - centre[..., None]).abs() / scale.clamp(min=1)[..., None]
    inside = (pixel > first[..., None]) & (pixel < (first + length)[..., None])
    weights = (1 - distance).clamp_(min=0) * inside
    return weights / weights.sum(2, keepdim=True)
