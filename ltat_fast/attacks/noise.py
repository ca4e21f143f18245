"""Random numbers of an image that depend on its index in the dataset, and not on its batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ltat_fast import seeding

Stream = tuple[int | str, ...]
"""The name of a random stream, see :mod:`ltat_fast.seeding`."""

_BLOCK = 64


def image_noise(
    indices: Tensor,
    shape: Sequence[int],
    device: torch.device | str,
    draw: Callable[[Tensor, torch.Generator], object],
    *stream: int | str,
) -> Tensor:
    """Return random numbers, float32 ``(N, *shape)``.

    The numbers of an image depend only on ``stream`` and on its index in ``indices``, int64 ``(N,)`` on the CPU. They
    are drawn for blocks of consecutive indices, because one generator per image would cost more than the numbers.

    draw: fills a tensor in place from a generator, for example ``lambda t, g: t.normal_(generator=g)``.
    """
    noise = torch.empty(len(indices), *shape, device=device)
    blocks = indices // _BLOCK
    for block in blocks.unique().tolist():
        drawn = torch.empty(_BLOCK, *shape, device=device)
        draw(drawn, seeding.stream(device, *stream, block))
        inside = (blocks == block).nonzero().squeeze(1)
        noise[inside] = drawn[indices[inside] % _BLOCK]
    return noise


def uniform(low: float, high: float) -> Callable[[Tensor, torch.Generator], object]:
    """Return a ``draw`` for :func:`image_noise`."""
    return lambda numbers, generator: numbers.uniform_(low, high, generator=generator)


def normal(numbers: Tensor, generator: torch.Generator) -> object:
    """A ``draw`` for :func:`image_noise`: the standard normal distribution."""
    return numbers.normal_(generator=generator)
