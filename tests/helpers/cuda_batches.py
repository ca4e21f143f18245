"""Batches on a GPU, compared with those on the CPU."""

import torch
from torch import Tensor

from ltat_fast.data import DeviceLoader


def assert_same_without_synchronisation(on_device: DeviceLoader, expected: list[tuple[Tensor, Tensor]]) -> None:
    """Assert that epoch 1 has the ``expected`` batches, and that none but the first waits for the device."""
    list(on_device.batches(0))  # warm-up: loads kernels, allocates pinned memory
    batches = on_device.batches(1)
    first = next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (x, y), (expected_x, expected_y) in zip([first, *rest], expected, strict=True):
        assert torch.equal(x.cpu(), expected_x)
        assert torch.equal(y.cpu(), expected_y)
