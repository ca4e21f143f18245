"""Cache of decoded images: the first start decodes them, every later start maps the arrays into memory.

Each dataset has one folder with the ``.npy`` files of its splits and ``cache.json``, which holds the key and the CRC-32
of each file. The key, also the name of the folder, is a hash of everything that determines the arrays: names, sizes and
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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ltat_fast.data.decode import bad_images_error, decode_images, decoded_bytes
from ltat_fast.data.folder import Tree
from ltat_fast.data.space import free_disk, gib, require_memory
from ltat_fast.files import exclusive

FORMAT = 2
"""version of the cache, part of the key: raise it when the decoding or the layout of the cache changes"""
NAMES = ("train.images", "train.labels", "test.images", "test.labels")
"""the arrays of every dataset: images uint8 (N, 3, H, W), labels int64 (N,). With a split "val" there are those of
val too. If bad images are left out, each split has also positions int64 (N,): the places of its images in the tree"""
KINDS = ("images", "labels", "positions")
CARD = "cache.json"

Arrays = dict[str, np.ndarray]


def load_or_decode(
    tree: Tree, image_size: int | None, folders: list[Path], report: Callable[[str], None], skip_bad: bool = False
) -> Arrays:
    """Load the arrays of ``tree``, by name of :data:`NAMES`, from the cache, or decode the images and write the cache.

    Args:
        image_size: see :func:`ltat_fast.data.decode.read_image`
        folders: the folders that may hold the cache, in order of preference; one that is not writable is reported and
            skipped
        report: called with each line for the user
        skip_bad: leave out images that cannot be read or decoded, and say which

    Returns:
        Arrays that are read-only memory maps if they come from the cache.

    Raises:
        UserError: see :func:`ltat_fast.data.decode.decode_images`.
    """
    key, missing = _key(tree, image_size, skip_bad)
    if len(missing) == len(_paths(tree)):
        raise bad_images_error(missing)
    names = tuple(f"{split}.{kind}" for split in tree.splits for kind in KINDS[: 3 if skip_bad else 2])
    for folder in folders:
        if (arrays := read_cache(folder / key, key, names)) is not None:
            return arrays
    paths = [path for i, path in enumerate(_paths(tree)) if i not in missing]
    needed = decoded_bytes(paths, image_size, tree.open_image)
    require_memory(needed)
    for folder in folders:
        if not _fits(folder, needed, report):
            continue
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(folder / f"{key}.lock", report))
            except OSError as error:
                report(f"cannot keep decoded images in {folder}: {error.strerror}")
                continue
            # Another process may have written it while this one waited for the lock.
            if (arrays := read_cache(folder / key, key, names)) is not None:
                return arrays
            arrays = _decode(tree, image_size, report, missing, skip_bad)
            try:
                write_cache(folder / key, key, arrays)
            except OSError as error:
                report(f"cannot keep decoded images in {folder}: {error.strerror}")
            return arrays
    return _decode(tree, image_size, report, missing, skip_bad)


def left_out(tree: Tree, arrays: Arrays) -> list[str]:
    """Return the paths of ``tree`` that ``arrays`` leave out, relative to its root."""
    paths = []
    for name, split in tree.splits.items():
        if (positions := arrays.get(f"{name}.positions")) is not None:
            kept = np.isin(np.arange(len(split.paths)), positions)
            paths += [os.path.relpath(split.paths[i], tree.root) for i in np.flatnonzero(~kept)]
    return paths


def read_cache(folder: Path, key: str, names: Sequence[str] = NAMES) -> Arrays | None:
    """Map the arrays ``names``, read-only; None if ``folder`` is missing, incomplete, damaged, or has another key."""
    try:
        if json.loads((folder / CARD).read_bytes()) != _card(folder, key, names):
            return None
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    except (OSError, ValueError, RecursionError):  # RecursionError: damaged JSON can nest without end
        return None


def write_cache(folder: Path, key: str, arrays: Arrays) -> None:
    """Replace ``folder`` by one that holds ``arrays``. The caller holds the lock.

    Args:
        arrays: C-contiguous, with names as in :data:`NAMES`

    Raises:
        OSError: the disk is full or not writable.
    """
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    try:
        partial.mkdir()
        for name in arrays:
            with (partial / f"{name}.npy").open("wb") as file:
                # Not np.save: on a full disk it raises an OSError without a reason, or loses the last bytes silently.
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(arrays[name]))
                file.write(arrays[name].data)
                file.flush()
                os.fsync(file.fileno())
        (partial / CARD).write_text(json.dumps(_card(partial, key, arrays)))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged cache
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def user_cache_folder() -> Path:
    """Return the cache folder of the user (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltat_fast"


def _card(folder: Path, key: str, names: Iterable[str]) -> dict:
    """Return what :data:`CARD` must hold. The files are read through memory maps, so nothing is copied."""
    files = [f"{name}.npy" for name in names]
    return {"key": key, "crc32": {file: zlib.crc32(np.memmap(folder / file, np.uint8, "r")) for file in files}}


def _decode(
    tree: Tree, image_size: int | None, report: Callable[[str], None], missing: dict[int, str], skip_bad: bool
) -> Arrays:
    """Decode the images of ``tree``. missing: files that cannot be read, by position.

    Raises UserError, unless ``skip_bad`` is set, if there are missing files or some cannot be decoded.
    """
    start = time.monotonic()
    val = f", {len(tree.val.paths):,} validation" if tree.val is not None else ""
    report(
        f"decoding {len(tree.train.paths):,} training{val} and {len(tree.test.paths):,} test images from {tree.root}"
    )
    bad = dict(missing)
    # One call for all splits, so that a training and a test image of different size are found too.
    images = decode_images(_paths(tree), image_size, report, bad, tree.open_image)
    if bad and not skip_bad:
        raise bad_images_error(bad)
    report(f"decoded in {time.monotonic() - start:.1f} s")
    arrays, first, row = {}, 0, 0
    for name, split in tree.splits.items():
        places = range(first, first + len(split.paths))
        positions = np.array([i - first for i in places if i not in bad], np.int64)
        arrays[f"{name}.images"] = images[row : row + len(positions)]
        arrays[f"{name}.labels"] = np.array(split.labels, np.int64)[positions]
        if skip_bad:
            arrays[f"{name}.positions"] = positions
        first, row = places.stop, row + len(positions)
    return arrays


def _paths(tree: Tree) -> list[str]:
    """Return the paths of all splits of ``tree``."""
    return [path for split in tree.splits.values() for path in split.paths]


def _fits(folder: Path, needed: int, report: Callable[[str], None]) -> bool:
    """Return whether the disk of ``folder`` has room for ``needed`` bytes; report it if not."""
    try:
        free = free_disk(folder)
    except OSError:  # the next step reports it
        return True
    if needed > free:
        report(
            f"these images need {gib(needed)}, but the disk of {folder} has {gib(free)} free: they are not kept there"
        )
    return needed <= free


def _key(tree: Tree, image_size: int | None, skip_bad: bool) -> tuple[str, dict[int, str]]:
    """Return the hash of everything that determines the arrays, as 32 hex digits, and the files that are missing.

    Missing files are reasons by position in :func:`_paths`.
    """
    options = [FORMAT, image_size, tree.class_names] + (["skip"] if skip_bad else [])
    digest = hashlib.sha256(json.dumps(options).encode())
    root = os.fspath(tree.root)
    missing: dict[int, str] = {}
    place = 0
    for number, split in enumerate(tree.splits.values()):
        digest.update(b"\n" if number else b"")
        for path, label in zip(split.paths, split.labels, strict=True):
            status = _status(tree.file_of(path))
            if isinstance(status, str):
                missing[place] = f"cannot read {path}: {status}"
                version = "missing"
            else:
                version = f"{status.st_size} {status.st_mtime_ns}"
            digest.update(f"{path.removeprefix(root)!r} {label} {version}\n".encode())
            place += 1
    return digest.hexdigest()[:32], missing


def _status(path: str) -> os.stat_result | str:
    """Return the status of a file, or the reason why it cannot be read."""
    try:
        status = os.stat(path)
    except OSError as error:
        return error.strerror or str(error)
    # Reading a pipe would wait for its writer.
    return status if stat.S_ISREG(status.st_mode) else "it is not a file"
