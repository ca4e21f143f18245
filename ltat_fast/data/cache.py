"""Decoded images, kept beside the data so that the next start is a memory map.

One safetensors file holds the four arrays of a dataset. Its name is a hash of what went in (the names, sizes and
modification times of the files, the labels, the options), so a changed tree misses the cache. It is written under a
temporary name, synced and renamed, and a reader checks its key and a CRC-32 over its header and all its data: what is
half-written or damaged is decoded again. The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ltat_fast.data.decode import decode_images
from ltat_fast.data.folder import Split, Tree
from ltat_fast.errors import UserError
from ltat_fast.files import exclusive

FORMAT = 1  # part of the key: raise it when what is decoded or written changes
Arrays = dict[str, np.ndarray]
_DTYPES = {"I64": np.dtype("<i8"), "U8": np.dtype("u1")}


def prepare(tree: Tree, image_size: int | None, directories: list[Path], report: Callable[[str], None]) -> Arrays:
    """The arrays of ``tree``: ``{train,test}.{images,labels}``; from the second time on, read-only memory maps.

    Args:
        directories: where to look and write, in order; one that cannot be written to is reported and passed over

    Raises:
        UserError: see :func:`ltat_fast.data.decode.decode_images`.
    """
    key = _key(tree, image_size)
    candidates = [directory / f"{key}.safetensors" for directory in directories]
    for path in candidates:
        if (arrays := read_cache(path, key)) is not None:
            return arrays
    for path in candidates:
        with contextlib.ExitStack() as stack:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(path.with_suffix(".lock"), report))
            except OSError as error:
                report(f"cannot keep decoded images in {path.parent}: {error.strerror}")
                continue
            if (arrays := read_cache(path, key)) is not None:  # another process held the lock and has written it
                return arrays
            arrays = _decode(tree, image_size, report)
            try:
                write_cache(path, key, arrays)
            except OSError as error:
                report(f"cannot keep decoded images in {path.parent}: {error.strerror}")
            return arrays
    return _decode(tree, image_size, report)


def read_cache(path: Path, key: str) -> Arrays | None:
    """The arrays in ``path`` as read-only memory maps, or None where it is missing, damaged or another's."""
    try:
        data = np.memmap(path, np.uint8, "r")
        body = 8 + int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8:body].tobytes())
        metadata = header.pop("__metadata__")
        if metadata["key"] != key or int(metadata["crc32"]) != _crc32(header, [data[body:]]):
            return None
        return {
            name: data[body:][slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_cache(path: Path, key: str, arrays: Arrays) -> None:
    """Write ``arrays`` to ``path`` as a whole or not at all; the caller holds the lock of ``path``."""
    dtype_names = {dtype: name for name, dtype in _DTYPES.items()}
    header, offset = {}, 0
    for name, array in arrays.items():
        span = [offset, offset := offset + array.nbytes]
        header[name] = {"dtype": dtype_names[array.dtype], "shape": array.shape, "data_offsets": span}
    metadata = {"key": key, "crc32": str(_crc32(header, arrays.values()))}
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the data, and with it every label, is aligned
    partial = path.with_suffix(".part")
    try:
        with partial.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in arrays.values():
                file.write(array.data.cast("B"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _crc32(header: dict, data: Iterable[np.ndarray]) -> int:
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for block in data:
        crc = zlib.crc32(block, crc)
    return crc


def user_cache() -> Path:
    """The user's own cache directory, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ltat_fast"


def _decode(tree: Tree, image_size: int | None, report: Callable[[str], None]) -> Arrays:
    begin = time.monotonic()
    report(f"decoding {len(tree.train.paths):,} training and {len(tree.test.paths):,} test images from {tree.root}")
    splits = {"train": tree.train, "test": tree.test}
    # one call for both splits, so that a difference in size between them is found too
    images = decode_images(tree.train.paths + tree.test.paths, image_size, report)
    report(f"decoded in {time.monotonic() - begin:.1f} s")
    arrays = {f"{name}.labels": np.array(split.labels, np.int64) for name, split in splits.items()}
    boundary = len(tree.train.paths)
    return arrays | {"train.images": images[:boundary], "test.images": images[boundary:]}


def _key(tree: Tree, image_size: int | None) -> str:
    """Hash of everything that decides the arrays."""
    digest = hashlib.sha256(json.dumps([FORMAT, image_size, tree.class_names]).encode())
    root = os.fspath(tree.root)

    def add(split: Split) -> None:
        for path, label in zip(split.paths, split.labels, strict=True):
            try:
                status = os.stat(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
            if not stat.S_ISREG(status.st_mode):  # to read a pipe is to wait for whoever writes to it
                raise UserError(f"cannot read {path}: it is not a file")
            name = path.removeprefix(root)
            digest.update(f"{name!r} {label} {status.st_size} {status.st_mtime_ns}\n".encode())

    add(tree.train)
    digest.update(b"\n")
    add(tree.test)
    return digest.hexdigest()[:32]
