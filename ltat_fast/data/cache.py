"""Cache of decoded images: the first start decodes them, every later start maps the arrays into memory.

Each dataset has one folder with four ``.npy`` files and ``cache.json``, which holds the key and the CRC-32 of each
file. The key, also the name of the folder, is a hash of everything that determines the arrays: names, sizes and
modification times of the image files, labels and options. So a changed dataset misses the cache. The folder is written
under a temporary name, synced and renamed. A reader that finds it incomplete or damaged decodes again. The cache may be
deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ltat_fast.data.decode import decode_images
from ltat_fast.data.folder import Split, Tree
from ltat_fast.errors import UserError
from ltat_fast.files import exclusive

FORMAT = 2
"""version of the cache, part of the key: raise it when the decoding or the layout of the cache changes"""
NAMES = ("train.images", "train.labels", "test.images", "test.labels")
"""the arrays: images uint8 (N, 3, H, W), labels int64 (N,)"""
CARD = "cache.json"

Arrays = dict[str, np.ndarray]


def load_or_decode(tree: Tree, image_size: int | None, folders: list[Path], report: Callable[[str], None]) -> Arrays:
    """Load the arrays of ``tree``, by name of :data:`NAMES`, from the cache, or decode the images and write the cache.

    Args:
        image_size: see :func:`ltat_fast.data.decode.read_image`
        folders: the folders that may hold the cache, in order of preference; one that is not writable is reported and
            skipped
        report: called with each line for the user

    Returns:
        Arrays that are read-only memory maps if they come from the cache.

    Raises:
        UserError: see :func:`ltat_fast.data.decode.decode_images`.
    """
    key = _key(tree, image_size)
    for folder in folders:
        if (arrays := read_cache(folder / key, key)) is not None:
            return arrays
    for folder in folders:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(folder / f"{key}.lock", report))
            except OSError as error:
                report(f"cannot keep decoded images in {folder}: {error.strerror}")
                continue
            if (arrays := read_cache(folder / key, key)) is not None:  # written while this process waited for the lock
                return arrays
            arrays = _decode(tree, image_size, report)
            try:
                write_cache(folder / key, key, arrays)
            except OSError as error:
                report(f"cannot keep decoded images in {folder}: {error.strerror}")
            return arrays
    return _decode(tree, image_size, report)


def read_cache(folder: Path, key: str) -> Arrays | None:
    """Map the arrays in ``folder``, read-only; None if it is missing, incomplete, damaged, or has another key."""
    try:
        if json.loads((folder / CARD).read_bytes()) != _card(folder, key):
            return None
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES}
    except (OSError, ValueError, RecursionError):  # RecursionError: damaged JSON can nest without end
        return None


def write_cache(folder: Path, key: str, arrays: Arrays) -> None:
    """Replace ``folder`` by one that holds ``arrays``. The caller holds the lock.

    Args:
        arrays: C-contiguous, with the names of :data:`NAMES`

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        for name in NAMES:
            with (partial / f"{name}.npy").open("wb") as file:
                # Not np.save: on a full disk it raises an OSError without a reason, or loses the last bytes silently.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(arrays[name]))
                file.write(arrays[name].data)
                file.flush()
                os.fsync(file.fileno())
        (partial / CARD).write_text(json.dumps(_card(partial, key)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged cache
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def user_cache_folder() -> Path:
    """Return the cache folder of the user (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltat_fast"


def _card(folder: Path, key: str) -> dict:
    """Return what :data:`CARD` must hold. The files are read through memory maps, so nothing is copied."""
    files = [f"{name}.npy" for name in NAMES]
    return {"key": key, "crc32": {file: zlib.crc32(np.memmap(folder / file, np.uint8, "r")) for file in files}}


def _decode(tree: Tree, image_size: int | None, report: Callable[[str], None]) -> Arrays:
    start = time.monotonic()
    num_train = len(tree.train.paths)
    report(f"decoding {num_train:,} training and {len(tree.test.paths):,} test images from {tree.root}")
    # One call for both splits, so that a training and a test image of different size are found too.
    images = decode_images(tree.train.paths + tree.test.paths, image_size, report)
    report(f"decoded in {time.monotonic() - start:.1f} s")
    return {
        "train.images": images[:num_train],
        "train.labels": np.array(tree.train.labels, np.int64),
        "test.images": images[num_train:],
        "test.labels": np.array(tree.test.labels, np.int64),
    }


def _key(tree: Tree, image_size: int | None) -> str:
    """Return the hash of everything that determines the arrays, as 32 hex digits."""
    digest = hashlib.sha256(json.dumps([FORMAT, image_size, tree.class_names]).encode())
    root = os.fspath(tree.root)

    def add(split: Split) -> None:
        for path, label in zip(split.paths, split.labels, strict=True):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for its writer
                raise UserError(f"cannot read {path}: it is not a file")
            name = path.removeprefix(root)
            digest.update(f"{name!r} {label} {status.st_size} {status.st_mtime_ns}\n".encode())

    add(tree.train)
    digest.update(b"\n")
    add(tree.test)
    return digest.hexdigest()[:32]
