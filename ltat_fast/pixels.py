"""Conversion of stored images to network inputs."""

import torch
from torch import Tensor


def to_unit(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]: x / 255 as in torchvision's ToTensor, bit-equal on every device.

    The divisor is a tensor because CUDA replaces division by a Python number with multiplication by 1 / 255, which
    rounds to another float32 for half of the pixel values.
    """
    return x.to(torch.float32, memory_format=memory_format).div_(torch.full((), 255.0, device=x.device))
