"""Batches from a dataset of uint8 images, which are on the training device or stay on the host.

Order and augmentation of an epoch are a function of (seed, epoch) alone: one permutation and one set of augmentation
draws, made on the CPU and sent to the device once. So a run can start at any step of any epoch without stored state,
sees the same images on every device, and can be divided over processes without changing the batches.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ltat_fast.data.augment import POLICIES, Crops, apply_crops, draw_crops
from ltat_fast.data.host import HostImages
from ltat_fast.data.resized_crop import ResizedCrops, apply_resized_crops, draw_resized_crops
from ltat_fast.errors import UserError
from ltat_fast.pixels import to_unit
from ltat_fast.seeding import stream

Draws = tuple[Crops | ResizedCrops, Tensor | None]
"""crops on the device, and operations of the augmentation on the CPU"""


class DeviceLoader:
    """Iterate over shuffled, augmented batches of float32 images in [0, 1] and int64 labels.

    The images after the last full batch of an epoch are dropped; they are different images in each epoch.

    Args:
        images: uint8 (N, C, H, W), tensor or array; moved to ``device``, and shared, not copied, if it is there
            already. Or :class:`HostImages` for ``device``, whose batches are read and copied while the device computes
        labels: int64 (N,)
        batch_size: images per step over all processes together. Each process takes its contiguous share of every
            batch, so the shares of all processes together are the batch of a run with one process.
        seed: seed of the order and of the augmentation
        pad: zeros per side before the random crop of ``crop="pad"``
        flip: whether images are flipped horizontally with probability 1/2
        augment: "none", "randaugment" or "autoaugment"; applied before the crop of "pad" and after that of "resized"
        crop: "pad": a random crop of the padded images; "resized": a random part of the image, resized
        size: height and width of the batches in pixels; None keeps those of the images
        device: device of the dataset and of the batches
        channels_last: whether the batches have the channels_last memory format
        rank, world_size: number of this process, and number of processes, which must divide ``batch_size``
        indices: int64, the images to visit in each epoch, with repetitions if they repeat; None visits each image once.
            Several loaders can use different parts of the same tensor.

    Raises:
        UserError: fewer images than one batch, a batch that does not split evenly, an unknown augmentation, or a colour
            augmentation for grey images.
        ValueError: images, labels, rank or world_size that do not fit together.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray | HostImages,
        labels: Tensor | np.ndarray,
        *,
        batch_size: int,
        seed: int,
        pad: int,
        flip: bool,
        augment: str = "none",
        crop: str = "pad",
        size: int | None = None,
        device: torch.device | str,
        channels_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        indices: Tensor | np.ndarray | None = None,
    ) -> None:
        self.images = images if isinstance(images, HostImages) else resident(images, device)
        self.labels = resident(labels, device).long()
        self.indices = torch.arange(len(labels)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
        if self.images.dtype != torch.uint8 or len(self.images.shape) != 4 or len(images) != len(labels):
            raise ValueError(
                "images must be uint8 (N, C, H, W) with N labels, "
                f"got {self.images.dtype} {tuple(images.shape)} and {len(labels)} labels"
            )
        if augment != "none" and augment not in POLICIES:
            raise UserError(f"unknown augmentation {augment!r}; choose from none, {', '.join(POLICIES)}")
        if augment != "none" and images.shape[1] != 3:
            raise UserError(f"{augment} needs colour images, these have {images.shape[1]} channel(s)")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1} for {world_size} processes, got {rank}")
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"a batch of {batch_size} images does not split evenly over {world_size} processes")
        if len(self.indices) < batch_size:
            raise UserError(
                f"{len(self.indices)} images do not fill one batch of {batch_size}; use a smaller batch "
                "(--batch-size, for the teacher --teacher-batch-size)"
            )
        height, width = self.images.shape[2:]
        if size is None and crop == "resized":
            raise ValueError("resized crops need a size")
        if size is not None and crop == "pad" and (height != width or height + 2 * pad < size):
            raise ValueError(f"crops of {size} x {size} pixels do not fit into images of {height} x {width}")
        self.batch_size = batch_size
        self.seed, self.pad, self.flip = seed, pad, flip
        self.is_resized, self.size = crop == "resized", size
        augmented = (size, size) if self.is_resized else (height, width)
        self.policy = None if augment == "none" else POLICIES[augment](*augmented, self.images.device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.indices) // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches ``start``, ``start + 1``, ... of ``epoch``.

        Nothing waits for the device after the first batch.

        Yields:
            Images float32 (n, C, H, W) in [0, 1] and labels int64 (n,), with n = batch_size / world_size.
        """
        device = self.images.device
        order = torch.randperm(len(self.indices), generator=stream("cpu", self.seed, "permutation", epoch))
        order = self.indices[order]
        draws = self._draw(len(order), epoch)
        shares = [self._share(step) for step in range(start, len(self))]
        labels = self.labels[order.to(device)]
        for share, x in zip(shares, self._stored([order[share] for share in shares]), strict=True):
            yield to_unit(self._augment(x, draws, share), self.memory_format), labels[share]

    def _stored(self, indices: list[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each of ``indices``, int64 (n,) on the CPU, as uint8 on the device."""
        if isinstance(self.images, HostImages):
            yield from self.images.batches(index.numpy() for index in indices)
        elif indices:
            lengths = [len(index) for index in indices]
            for index in torch.cat(indices).to(self.images.device).split(lengths):  # one copy per epoch
                yield self.images[index]

    def _draw(self, n: int, epoch: int) -> Draws:
        """Draw the augmentation of the ``n`` images of an epoch."""
        device = self.images.device
        generator, (height, width) = stream("cpu", self.seed, "crop", epoch), self.images.shape[2:]
        if self.is_resized:
            crops = draw_resized_crops(n, height, width, self.flip, generator)
        else:
            slack = 2 * self.pad + (0 if self.size is None else height - self.size)
            crops = draw_crops(n, slack, self.flip, generator)
        crops = type(crops)(*(draw.to(device) for draw in crops))
        operations = self.policy.draw(n, stream("cpu", self.seed, "augment", epoch)) if self.policy else None
        return crops, operations

    def _augment(self, x: Tensor, draws: Draws, share: slice) -> Tensor:
        """Augment a batch, uint8 (n, C, H, W), with its ``share`` of the draws of the epoch."""
        crops, operations = draws
        crops = type(crops)(*(draw[share] for draw in crops))
        if isinstance(crops, ResizedCrops):
            x = apply_resized_crops(x, self.size, crops)
        if self.policy:
            x = self.policy.apply(x, operations[share])
        return apply_crops(x, self.pad, crops, self.size) if isinstance(crops, Crops) else x

    def _share(self, step: int) -> slice:
        """Return this process's share of batch ``step``, as positions in the order of the epoch."""
        size = self.batch_size // self.world_size
        begin = step * self.batch_size + self.rank * size
        return slice(begin, begin + size)


def resident(array: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """Return ``array`` as a dense tensor on ``device``.

    A tensor that is on ``device`` already is returned as it is. A writable array shares its memory with a CPU tensor; a
    read-only array is copied, because torch tensors are always writable.
    """
    if isinstance(array, np.ndarray):
        array = torch.from_numpy(array if array.flags.writeable else array.copy())
    return array.to(device).contiguous()
