"""Images as networks see them."""

import torch
from torch import Tensor


def to_unit(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """uint8 images as float32 in [0, 1]: x / 255 as torchvision's ToTensor has it, the same on every device.

    By a tensor, because CUDA turns the division by a number into a product with 1 / 255, which rounds to another
    float32 for half of the pixel values.
    """
    return x.to(torch.float32, memory_format=memory_format).div_(torch.full((), 255.0, device=x.device))
