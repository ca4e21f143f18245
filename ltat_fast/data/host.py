"""Images that stay on the host: rows of an array, usually of a memory map that is larger than the memory.

They are indexed like a tensor on the training device. Background threads gather the batches of an epoch into pinned
memory, and a CUDA stream of its own copies them to the device while it computes.
"""

import functools
import math
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ltat_fast.data.space import free_memory

THREADS = min(4, os.cpu_count() or 1)
"""threads that gather batches"""
AHEAD = 2 * THREADS
"""batches that are gathered before they are needed"""
BLOCK_BYTES = 2**26
"""about how many bytes are read at a time where all images are needed"""


class HostImages:
    """uint8 images ``(N, C, H, W)`` on the host, which an index moves to ``device``.

    Args:
        array: uint8 (M, C, H, W), C-contiguous
        rows: int64 (N,), the rows of ``array`` that are the images; all of them if None
        size: height and width of the images, the centre of those in ``array``; None keeps them whole
        device: device of the batches
    """

    dtype = torch.uint8

    def __init__(
        self,
        array: np.ndarray,
        rows: np.ndarray | None = None,
        size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.array = array
        self.rows = np.arange(len(array)) if rows is None else rows
        self.size = size
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> torch.Size:
        channels, height, width = self.array.shape[1:]
        height, width = (height, width) if self.size is None else (self.size, self.size)
        return torch.Size((len(self), channels, height, width))

    @property
    def nbytes(self) -> int:
        return self.shape.numel()

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the images ``index``, int64 (n,), as a uint8 tensor on ``device``."""
        return self.gather(index.cpu().numpy()).to(self.device, non_blocking=True)

    def select(self, index: np.ndarray) -> "HostImages":
        """Return the images ``index``, int64 (n,), without reading them."""
        return HostImages(self.array, self.rows[index], self.size, self.device)

    def gather(self, index: np.ndarray) -> Tensor:
        """Return the images ``index``, int64 (n,), on the host: in pinned memory if ``device`` is a GPU."""
        rows = self.rows[index]
        if self._larger_than_memory:
            _read_ahead(self.array, rows)
        pinned = self.device.type == "cuda"
        images = torch.empty((len(rows), *self.array.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
        # The rows are in range; "clip" lets NumPy write into ``out`` without a copy of it.
        np.take(self.array, rows, axis=0, out=images.numpy(), mode="clip")
        if images.shape[1:] == self.shape[1:]:
            return images
        centred = centre(images, *self.shape[2:])
        return centred.pin_memory() if pinned else centred

    def batches(self, indices: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield the images of each of ``indices``, int64 (n,), on ``device``. They are read and copied ahead of use."""
        if self.device.type != "cuda":
            yield from self._gathered(indices)
            return
        copies = torch.cuda.Stream(self.device)
        ahead: tuple[Tensor, torch.cuda.Event] | None = None
        for host in self._gathered(indices):
            with torch.cuda.stream(copies):
                images = host.to(self.device, non_blocking=True)
            copied = ahead
            ahead = images, copies.record_event()
            if copied is not None:
                yield _after(*copied)
        if ahead is not None:
            yield _after(*ahead)

    def to_device(self) -> Tensor:
        """Return all images as one tensor on ``device``. They are read in blocks, so the host needs no second copy."""
        if self.device.type == "cpu" and self.array.flags.writeable and self._is_whole:
            return torch.from_numpy(self.array)
        images = torch.empty(self.shape, dtype=torch.uint8, device=self.device)
        for block in self.blocks():
            images[block.start : block.stop] = self.gather(np.asarray(block))
        return images

    def blocks(self) -> Iterator[range]:
        """Yield the positions of all images in blocks of about :data:`BLOCK_BYTES`."""
        step = max(1, BLOCK_BYTES // math.prod(self.array.shape[1:]))
        for start in range(0, len(self), step):
            yield range(start, min(start + step, len(self)))

    @functools.cached_property
    def _larger_than_memory(self) -> bool:
        """Whether the array is a memory map that the system cannot keep in memory."""
        return isinstance(self.array, np.memmap) and 2 * self.array.nbytes > free_memory()

    @property
    def _is_whole(self) -> bool:
        return self.array.shape == self.shape and np.array_equal(self.rows, np.arange(len(self.array)))

    def _gathered(self, indices: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield the images of each of ``indices`` on the host, gathered ahead by background threads."""
        pool = ThreadPoolExecutor(THREADS, "gather")
        pending: deque[Future[Tensor]] = deque()
        try:
            for index in indices:
                pending.append(pool.submit(self.gather, index))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # also if the consumer stops in the middle of the epoch
            pool.shutdown(cancel_futures=True)


def centre(images: Tensor, height: int, width: int) -> Tensor:
    """Return the centre of images (..., H, W) as a dense tensor (..., height, width), rounded as in torchvision."""
    top, left = ((have - want) / 2 for have, want in zip(images.shape[-2:], (height, width), strict=True))
    top, left = round(top), round(left)
    return images[..., top : top + height, left : left + width].contiguous()


def _after(images: Tensor, copied: torch.cuda.Event) -> Tensor:
    """Let the current stream wait for ``copied``, and keep the memory of ``images`` until this stream has used it."""
    stream = torch.cuda.current_stream(images.device)
    stream.wait_event(copied)
    images.record_stream(stream)
    return images


def _read_ahead(array: np.memmap, rows: np.ndarray) -> None:
    """Ask the system to read ``rows``, all at once and nothing else.

    Without this, each access to a missing page waits for a read of up to several megabytes around it. Under a memory
    limit of half the size of the array, this made random batches 140 times slower.
    """
    pages: mmap.mmap | None = getattr(array, "_mmap", None)
    if pages is None or not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return
    first = array.ctypes.data - np.frombuffer(pages, np.uint8).ctypes.data
    for row in rows.tolist():
        start = first + row * array.strides[0]
        aligned = start - start % mmap.PAGESIZE
        pages.madvise(mmap.MADV_WILLNEED, aligned, start + array.strides[0] - aligned)
