"""Batches from a dataset that lies, as uint8, on the device that trains on it.

What an epoch draws is a function of (seed, epoch) alone: one permutation and one set of augmentation draws, made on
the CPU and sent to the device once. A run can therefore start at any step of any epoch with nothing stored, sees the
same images on every device, and splits over processes without changing them.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ltat_fast.data.augment import POLICIES, Crops, apply_crops, draw_crops
from ltat_fast.errors import UserError
from ltat_fast.pixels import to_unit
from ltat_fast.seeding import stream


class DeviceLoader:
    """Iterate over shuffled, augmented batches of float32 images in [0, 1] and int64 labels.

    Args:
        images: uint8 (N, C, H, W), tensor or array; moved to ``device`` unless it lies there, then shared, not copied
        labels: int64 (N,)
        batch_size: images of one step over all processes together; each takes its contiguous share of every batch,
            so the shares put together are the batch that a single process would see
        pad, flip: random crop from ``pad`` zeros a side, and random mirroring
        augment: "none", "randaugment" or "autoaugment", applied before crop and flip
        drop_last: leave out the images after the last full batch (others in each epoch); if not, the last batch is
            shorter, and a process's share of it can be empty
        channels_last: memory format of the batches
        rank, world_size: this process and how many there are; ``world_size`` divides ``batch_size``
        indices: int64, the images to visit in an epoch, repeats allowed; None visits each once. Loaders over
            different parts of one resident tensor share it.

    Raises:
        UserError: fewer images than a batch with ``drop_last``, no images, a batch that does not split evenly, an
            unknown augmentation, or one of colours for grey images.
        ValueError: arguments that contradict each other.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray,
        *,
        batch_size: int,
        seed: int,
        pad: int,
        flip: bool,
        augment: str = "none",
        device: torch.device | str,
        drop_last: bool = True,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        indices: Tensor | np.ndarray | None = None,
    ) -> None:
        self.images = resident(images, device)
        self.labels = resident(labels, device).long()
        self.indices = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or len(images) != len(labels):
            raise ValueError(
                "images must be uint8 (N, C, H, W) with N labels, "
                f"got {self.images.dtype} {tuple(images.shape)} and {len(labels)} labels"
            )
        if augment != "none" and augment not in POLICIES:
            raise UserError(f"unknown augmentation {augment!r}; choose from none, {', '.join(POLICIES)}")
        if augment != "none" and images.shape[1] != 3:
            raise UserError(f"{augment} needs colour images, these have {images.shape[1]} channel(s)")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist in a world of {world_size}")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"a batch of {batch_size} images does not split evenly over {world_size} processes")
        if len(self.indices) < (batch_size if drop_last else 1):
            raise UserError(
                f"{len(self.indices)} images do not fill one batch of {batch_size}; use a smaller batch "
                "(--batch-size, for the teacher --teacher-batch-size)"
            )
        self.batch_size, self.drop_last = batch_size, drop_last
        self.seed, self.pad, self.flip = seed, pad, flip
        self.policy = None if augment == "none" else POLICIES[augment](*images.shape[2:], self.images.device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.indices), self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start``, ``start + 1``, ... of ``epoch``: float32 (n, C, H, W) in [0, 1] and int64 (n,).

        Nothing here waits for the device after the first batch.
        """
        device = self.images.device
        order = torch.randperm(len(self.indices), generator=stream("cpu", self.seed, "permutation", epoch))
        order = self.indices[order].to(device)
        crops = draw_crops(len(order), self.pad, self.flip, stream("cpu", self.seed, "crop", epoch))
        crops = Crops(*(draw.to(device) for draw in crops))
        if self.policy:
            draws = self.policy.draw(len(order), stream("cpu", self.seed, "augment", epoch))
        for step in range(start, len(self)):
            share = self._share(step)
            index = order[share]
            x = self.images[index]
            if self.policy:
                x = self.policy.apply(x, draws[share])
            x = apply_crops(x, self.pad, Crops(*(draw[share] for draw in crops)))
            yield to_unit(x, self.memory_format), self.labels[index]

    def _share(self, step: int) -> slice:
        """Where this process's part of batch ``step`` lies within the epoch."""
        begin = step * self.batch_size
        size = min(self.batch_size, len(self.indices) - begin)
        return slice(begin + size * self.rank // self.world_size, begin + size * (self.rank + 1) // self.world_size)


def resident(array: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """``array`` as a dense tensor on ``device``; what lies there already is shared, a read-only array is copied."""
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(array if array.flags.writeable else array.copy())
    return array.to(device).contiguous()
