"""Cache of decoded images: the first start decodes them, every later start maps the arrays into memory.

Each dataset has one folder with an ``.npy`` file per split and ``cache.json``, which holds the key, the checksums of
the files and the bad images that they leave out. The key, also the name of the folder, is a hash of everything that
determines the pixels: names, sizes and modification times of the image files, and the size of the stored images. So a
changed dataset misses the cache. While images are decoded, the folder is called ``<key>.part``, and an interrupted
decoding is continued from it (:mod:`ltat_fast.data.partial`). A reader that finds a cache incomplete or damaged decodes
again. The cache may be deleted at any time.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from ltat_fast.data.decode import bad_images_error, decode_into, image_shape
from ltat_fast.data.digest import crc32_of_chunks, digest, images_digest
from ltat_fast.data.folder import Tree
from ltat_fast.data.partial import HEADER, Blocks, InMemory, OnDisk, Shape
from ltat_fast.data.space import disk_usage, free_disk, gib, require_memory
from ltat_fast.files import exclusive

FORMAT = 3
"""version of the cache, part of the key: raise it when the decoding or the layout of the cache changes"""
CARD = "cache.json"
KEPT = 2
"""caches of one dataset that are kept, the last used ones; each size of the images has its own"""
ABANDONED = 7 * 24 * 3600
"""seconds after which an interrupted decoding of another size or of other files is removed"""

IN_WORDS = {"train": "training", "test": "test", "val": "validation"}

Report = Callable[[str], None]


class Bar(Protocol):
    """A progress bar."""

    def advance(self, images: int, /) -> None: ...


OpenBar = Callable[[str, int], contextlib.AbstractContextManager[Bar]]
"""takes what is counted and how many there are"""


@dataclass(frozen=True)
class Decoded:
    """The images of a dataset."""

    images: dict[str, np.ndarray]
    """uint8 (N, 3, H, W) by split, without the bad images; read-only memory maps unless no disk had room for them"""
    digests: dict[str, str]
    """:func:`ltat_fast.data.digest.images_digest` of each split"""
    bad: dict[int, str]
    """reasons of the bad images by position among the images of all splits"""


@dataclass(frozen=True)
class Source:
    """The image files to decode, and whom to tell about it."""

    tree: Tree
    image_size: int | None
    """see :func:`ltat_fast.data.decode.read_image`"""
    report: Report
    """called with each line for the user"""
    open_bar: OpenBar

    @functools.cached_property
    def paths(self) -> list[str]:
        """The files of all splits."""
        return [path for split in self.tree.splits.values() for path in split.paths]

    @functools.cached_property
    def counts(self) -> dict[str, int]:
        """Images by split."""
        return {name: len(split.paths) for name, split in self.tree.splits.items()}

    @functools.cached_property
    def key_and_missing(self) -> tuple[str, dict[int, str]]:
        """The hash of everything that determines the pixels, as 32 hex digits, and the files that are missing.

        Missing files are reasons by position in ``paths``.
        """
        key = hashlib.sha256(json.dumps([FORMAT, self.image_size, *self.counts.items()]).encode())
        root = os.fspath(self.tree.root)
        missing: dict[int, str] = {}
        for place, path in enumerate(self.paths):
            status = _status(self.tree.file_of(path))
            if isinstance(status, str):
                missing[place] = f"cannot read {path}: {status}"
                version = status
            else:
                version = f"{status.st_size} {status.st_mtime_ns}"
            key.update(f"{path.removeprefix(root)!r} {version}\n".encode())
        return key.hexdigest()[:32], missing

    def decode(self, blocks: Blocks) -> None:
        """Decode the images into ``blocks``."""
        start = time.monotonic()
        what = " and ".join(f"{count:,} {IN_WORDS[split]}" for split, count in self.counts.items())
        self.report(f"decoding {what} images from {self.tree.root}")
        with self.open_bar("decoded images", len(self.paths)) as bar:
            # One call for all splits, so that a training and a test image of different size are found too.
            decode_into(blocks, self.paths, self.image_size, self.key_and_missing[1], self.tree.open_image, bar.advance)
        self.report(f"decoded in {time.monotonic() - start:.1f} s")


def load_or_decode(
    source: Source, folders: Sequence[Path], skip_bad: bool, writable: Sequence[Path] | None = None
) -> Decoded:
    """Load the images of ``source`` from the cache, or decode them and write the cache.

    Args:
        folders: the folders that may hold the cache, in order of preference; one that is not writable or has too
            little room is reported and skipped
        skip_bad: leave out images that cannot be read or decoded
        writable: those of ``folders`` to which a new cache may be written; all of them if None

    Raises:
        UserError: images are bad and ``skip_bad`` is not set, or all of them are bad; images differ in size; neither
            disk nor memory has room for them.
    """
    decoded = _load_or_decode(source, folders, folders if writable is None else writable)
    if decoded.bad and (not skip_bad or len(decoded.bad) == len(source.paths)):
        raise bad_images_error(decoded.bad)
    return decoded


def _load_or_decode(source: Source, folders: Sequence[Path], writable: Sequence[Path]) -> Decoded:
    key, missing = source.key_and_missing
    splits, report = tuple(source.counts), source.report
    for folder in folders:
        if (found := read_cache(folder / key, key, splits)) is not None:
            return found
    shape = image_shape(source.paths, source.image_size, missing, source.tree.open_image)
    needed = len(source.paths) * math.prod(shape)
    for folder in writable:
        partial = folder / f"{key}.part"
        if not _fits(folder, partial, needed, report):
            continue
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(folder / f"{key}.lock", report))
                # Another process may have written it while this one waited for the lock.
                if (found := read_cache(folder / key, key, splits)) is None:
                    found = _write_cache(source, folder / key, partial, shape)
                    _remove_old(folder, key, source.tree.root, report)
                return found
            except OSError as error:
                report(f"cannot keep decoded images in {folder}: {error.strerror}")
                shutil.rmtree(partial, ignore_errors=True)
    require_memory(needed)
    blocks = InMemory(source.counts, shape)
    source.decode(blocks)
    images = blocks.finish()
    digests = {split: images_digest(array.shape, crc32_of_chunks(array)) for split, array in images.items()}
    return Decoded(images, digests, blocks.bad)


def read_cache(folder: Path, key: str, splits: Sequence[str]) -> Decoded | None:
    """Map the images of ``splits``; None if ``folder`` is missing, incomplete, damaged, or has another key."""
    try:
        card = _read_card(folder)
        if card["key"] != key or card["crc32"] != _checksums(folder, splits):
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(folder / CARD)  # when it was last used
        return _open(folder, splits, card)
    # A damaged file can have any content, and damaged JSON can nest without end.
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def user_cache_folder() -> Path:
    """Return the cache folder of the user (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltat_fast"


def _write_cache(source: Source, folder: Path, partial: Path, shape: Shape) -> Decoded:
    """Decode the images into ``partial``, then rename it to ``folder``. The caller holds the lock. Raises OSError."""
    about = {"key": folder.name, "root": os.fspath(source.tree.root)}
    blocks = OnDisk(partial, about, source.counts, shape)
    if blocks.finished:
        source.report(f"continuing an interrupted decoding of {source.tree.root}")
    try:
        source.decode(blocks)
    except BaseException:
        with contextlib.suppress(OSError):
            blocks.close()
        raise
    blocks.finish()
    card = about | {"bad": sorted(blocks.bad.items()), "crc32": _checksums(partial, tuple(source.counts))}
    with (partial / CARD).open("w") as file:
        json.dump({"content": card, "sha256": digest(card)}, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # a damaged cache
    partial.rename(folder)
    return _open(folder, tuple(source.counts), card)


def _open(folder: Path, splits: Sequence[str], card: dict) -> Decoded:
    images = {split: np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False) for split in splits}
    digests = {split: images_digest(array.shape, card["crc32"][f"{split}.npy"][1:]) for split, array in images.items()}
    return Decoded(images, digests, {int(position): str(reason) for position, reason in card["bad"]})


def _read_card(folder: Path) -> dict:
    """Return the content of the card. Raises an error of any type if it is missing or damaged."""
    card = json.loads((folder / CARD).read_bytes())
    if card["sha256"] != digest(card["content"]):
        raise ValueError("the card is damaged")
    return card["content"]


def _checksums(folder: Path, splits: Sequence[str]) -> dict[str, list[int]]:
    """Return the CRC-32 of the header of each file, followed by those of its pixels."""
    files = {f"{split}.npy": np.memmap(folder / f"{split}.npy", np.uint8, "r") for split in splits}
    return {name: [zlib.crc32(file[:HEADER]), *crc32_of_chunks(file[HEADER:])] for name, file in files.items()}


def _remove_old(folder: Path, key: str, root: Path, report: Report) -> None:
    """Remove all but the :data:`KEPT` last used caches of ``root`` in ``folder``, and abandoned decodings of it."""
    finished = []
    for card in folder.glob(f"*/{CARD}"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if card.parent.name != key and _read_card(card.parent)["root"] == os.fspath(root):
                finished.append((card.stat().st_mtime, card.parent))
    old = [path for _, path in sorted(finished)[: 1 - KEPT]]
    for journal in folder.glob("*.part/decoded.jsonl"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            about = json.loads(journal.open().readline())
            if about["root"] == os.fspath(root) and time.time() - journal.stat().st_mtime > ABANDONED:
                old.append(journal.parent)
    for path in old:
        size = disk_usage(path)
        shutil.rmtree(path, ignore_errors=True)
        report(f"removed decoded images of {root} at another size or from earlier files: {gib(size)}")


def _fits(folder: Path, partial: Path, needed: int, report: Report) -> bool:
    """Return whether the disk of ``folder`` has room for ``needed`` bytes; report it if not.

    partial: files of an interrupted decoding, which count as free.
    """
    try:
        free = free_disk(folder)
        with contextlib.suppress(FileNotFoundError):
            free += disk_usage(partial)
    except OSError:  # the next step reports it
        return True
    if needed > free:
        report(
            f"these images need {gib(needed)}, but the disk of {folder} has {gib(free)} free: they are not kept there"
        )
    return needed <= free


def _status(path: str) -> os.stat_result | str:
    """Return the status of a file, or the reason why it cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    # Reading a pipe would wait for its writer.
    return status if stat.S_ISREG(status.st_mode) else "it is not a file"
