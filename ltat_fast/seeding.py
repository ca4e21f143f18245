"""Random streams that are a function of the position in the run, so that a resumed run needs no generator state.

Code that draws random numbers names its stream, for example ``stream_seed(seed, "attack", epoch, step)``. Streams are
independent, a new stream does not change the others, and step 1000 can be replayed without the 999 steps before it.
"""

import hashlib

import torch


def stream_seed(*name: int | str) -> int:
    """Return the 63-bit seed of the stream called ``name``, the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(repr, name)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(device: torch.device | str, *name: int | str) -> torch.Generator:
    """Return a generator on ``device`` at the start of the stream called ``name``."""
    return torch.Generator(device=device).manual_seed(stream_seed(*name))
