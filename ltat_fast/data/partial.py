"""Where decoded images go: into memory, or into files, so that an interrupted decoding can be continued."""

import contextlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

HEADER = 128
"""bytes before the pixels in each .npy file"""
JOURNAL = "decoded.jsonl"
"""what is known of the images (first line), then one line per finished block"""
SYNC_SECONDS = 5.0
"""an interruption loses the blocks that were finished since the last sync"""

Shape = tuple[int, int, int]


class Blocks:
    """Base of the two places: which blocks of images are finished, and which images could not be decoded.

    counts: images by split. shape: channels, height and width of all of them. An image is named by its position among
    the images of all splits, in the order of ``counts``.
    """

    def __init__(self, counts: Mapping[str, int], shape: Shape) -> None:
        self.counts, self.shape = dict(counts), shape
        self.bad: dict[int, str] = {}
        """reasons by position"""
        self.finished: set[int] = set()
        """position of the first image of each block that an interrupted decoding finished"""

    def write(self, start: int, images: np.ndarray, bad: Mapping[int, str]) -> None:
        """Store a block of ``images``, uint8 (n, C, H, W), whose first has position ``start``; all are of one split.

        bad: reasons by position for those images that could not be decoded. Several threads may call this method.
        """
        raise NotImplementedError

    def finish(self) -> dict[str, np.ndarray]:
        """Return the images of each split without the bad ones. Nothing is written afterwards."""
        raise NotImplementedError

    def good(self, split: str) -> np.ndarray:
        """Return the rows of ``split`` that hold images, int64, ascending."""
        return good_rows(self.counts, self.bad)[split]

    def place(self, position: int) -> tuple[str, int]:
        """Return the split of an image and its row in this split."""
        for split, count in self.counts.items():
            if position < count:
                return split, position
            position -= count
        raise IndexError("no such image")


class InMemory(Blocks):
    """Images in memory, for machines on which no disk has room for them."""

    def __init__(self, counts: Mapping[str, int], shape: Shape) -> None:
        super().__init__(counts, shape)
        self.images = {split: np.empty((count, *shape), np.uint8) for split, count in counts.items()}

    def write(self, start: int, images: np.ndarray, bad: Mapping[int, str]) -> None:
        split, row = self.place(start)
        self.images[split][row : row + len(images)] = images
        self.bad.update(bad)

    def finish(self) -> dict[str, np.ndarray]:
        return {split: array[: close_gaps(array, self.good(split))] for split, array in self.images.items()}


class OnDisk(Blocks):
    """Images in ``folder``, one .npy file per split, and a journal of the finished blocks.

    about: what the journal must say of the images to be continued; with other images the folder is emptied first.
    Each method raises OSError if the disk is full or not writable.
    """

    def __init__(self, folder: Path, about: dict, counts: Mapping[str, int], shape: Shape) -> None:
        super().__init__(counts, shape)
        self.folder = folder
        about = about | {"counts": self.counts, "shape": list(shape)}
        if not self._continue(about):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / JOURNAL).write_text(json.dumps(about) + "\n")
        self._lock, self._unsynced, self._last_sync = threading.Lock(), [], time.monotonic()
        with contextlib.ExitStack() as stack:
            self._files = {split: stack.enter_context(self._open(split)) for split in self.counts}
            self._journal = stack.enter_context((folder / JOURNAL).open("a"))
            self._close_files = stack.pop_all().close

    def write(self, start: int, images: np.ndarray, bad: Mapping[int, str]) -> None:
        split, row = self.place(start)
        file, line = self._files[split], json.dumps({"start": start, "bad": {str(i): bad[i] for i in bad}})
        with self._lock:
            file.seek(HEADER + row * self._bytes_per_image)
            file.write(images.data)
            file.flush()
            self.bad.update(bad)
            self._unsynced.append(line + "\n")
            if time.monotonic() - self._last_sync > SYNC_SECONDS:
                self._sync()

    def finish(self) -> dict[str, np.ndarray]:
        """Close the files, remove the bad images from them, and return them as read-only memory maps."""
        self.close()
        (self.folder / JOURNAL).unlink()  # an interruption from here on leaves nothing to continue from
        for split, count in self.counts.items():
            if len(self.good(split)) < count:
                self._remove_bad(split)
        return {split: np.load(self._file(split), mmap_mode="r") for split in self.counts}

    def close(self) -> None:
        """Record the finished blocks in the journal and close the files."""
        try:
            with self._lock:
                self._sync()
        finally:
            self._close_files()

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}.npy"

    @property
    def _bytes_per_image(self) -> int:
        return math.prod(self.shape)

    def _sync(self) -> None:
        """Sync the pixels and then the journal, so that the journal never claims pixels that a power cut lost."""
        for file in self._files.values():
            os.fsync(file.fileno())
        self._journal.writelines(self._unsynced)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._unsynced, self._last_sync = [], time.monotonic()

    def _open(self, split: str) -> BinaryIO:
        """Open the file of ``split``; make it first, with a hole in place of the pixels, if it does not exist."""
        path = self._file(split)
        if not path.exists():
            path.write_bytes(npy_header((self.counts[split], *self.shape)))
            os.truncate(path, HEADER + self.counts[split] * self._bytes_per_image)
        return path.open("r+b")

    def _remove_bad(self, split: str) -> None:
        path = self._file(split)
        images = np.memmap(path, np.uint8, "r+", HEADER, (self.counts[split], *self.shape))
        left = close_gaps(images, self.good(split))
        images.flush()
        del images
        with path.open("r+b") as file:
            file.write(npy_header((left, *self.shape)))
            file.truncate(HEADER + left * self._bytes_per_image)
            file.flush()
            os.fsync(file.fileno())

    def _continue(self, about: dict) -> bool:
        """Read which blocks are finished. Return False if the journal is missing or is about other images."""
        journal = self.folder / JOURNAL
        try:
            first, *lines = journal.read_text().splitlines(keepends=True)
        except (OSError, ValueError):
            return False
        if first != json.dumps(about) + "\n" or any(not self._file(split).is_file() for split in self.counts):
            return False
        length = len(first)
        for line in lines:
            try:
                block = json.loads(line if line.endswith("\n") else "")
                bad = {int(i): str(reason) for i, reason in block["bad"].items()}
                self.finished.add(int(block["start"]))
            except (ValueError, TypeError, KeyError, AttributeError):  # a crash cut the last line short
                break
            self.bad.update(bad)
            length += len(line)
        os.truncate(journal, length)  # json.dumps writes ASCII: one byte per letter
        return True


def good_rows(counts: Mapping[str, int], bad: Mapping[int, str]) -> dict[str, np.ndarray]:
    """Return for each split the rows, int64, ascending, whose positions among all splits are not ``bad``."""
    rows, first = {}, 0
    for split, count in counts.items():
        rows[split] = np.setdiff1d(np.arange(count), np.array([i - first for i in bad], np.int64))
        first += count
    return rows


def close_gaps(images: np.ndarray, good: np.ndarray) -> int:
    """Move the rows ``good`` to the front, in place: the images may fill most of the memory. Return how many."""
    if len(good) < len(images):
        for row, i in enumerate(good):
            images[row] = images[i]
    return len(good)


def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the first :data:`HEADER` bytes of the .npy file of a C-contiguous uint8 array."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11) + b"\n"
