"""Random streams that are functions of where the run is, so that a resumed run needs no stored generator state.

Every consumer of randomness names its stream: ``stream_seed(seed, "attack", epoch, step)``. Two streams never share
draws, adding one does not move another, and step 1000 can be replayed without running the 999 before it.
"""

import hashlib

import torch


def stream_seed(*name: int | str) -> int:
    """A 63-bit seed for the stream called ``name``: the same on every machine and in every process."""
    digest = hashlib.sha256("\x1f".join(map(repr, name)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(device: torch.device | str, *name: int | str) -> torch.Generator:
    """A generator on ``device`` at the start of the stream called ``name``."""
    return torch.Generator(device=device).manual_seed(stream_seed(*name))
