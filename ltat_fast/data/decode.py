"""Decode image files into uint8 arrays."""

import contextlib
import math
import os
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltat_fast.data.partial import Blocks
from ltat_fast.errors import UserError

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""extensions of the files that count as images"""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""formats that are decoded; the content of a file decides, not its extension"""
MAX_PIXELS = 2**26
"""limit on the pixels of an image, checked before decoding, because a file of a few kilobytes can claim gigabytes"""
LARGE_PIXELS = 2**23
"""images with more pixels are decoded one at a time, so that the memory does not grow with the number of threads"""
BAND_PIXELS = 2**20
"""pixels that are converted at a time, because a conversion needs several times the memory of its pixels"""
MAX_TILE_BYTES = 2**28
"""limit on a tile or strip of a TIFF file, which can be larger than its image, and is decoded as a whole"""
MAX_SCAN_PIXELS = 2**30
"""limit on scans times pixels of a progressive JPEG file, which is its decoding time; encoders write about ten scans"""
NAMED_FILES = 20
"""number of bad files that a message names; the others are counted"""
BLOCK_IMAGES, BLOCK_BYTES = 256, 2**25
"""how many images one thread decodes at a time, at most"""

_one_large_image = threading.Lock()
_BITS_PER_SAMPLE, _SAMPLES_PER_PIXEL, _TILE_WIDTH, _TILE_LENGTH = 258, 277, 322, 323  # tags of TIFF

OpenImage = Callable[[str | Path], BinaryIO]


def open_file(path: str | Path) -> BinaryIO:
    """Open an image that is a file of its own."""
    return open(path, "rb")


def decode_into(
    blocks: Blocks,
    paths: Sequence[str],
    image_size: int | None,
    bad: Mapping[int, str],
    open_image: OpenImage = open_file,
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Decode files into ``blocks``, in parallel. Blocks that are finished already are not decoded again.

    Threads are enough: Pillow releases the GIL while it decodes, converts and resizes.

    Args:
        blocks: takes the images; files that cannot be decoded are in its ``bad`` afterwards
        paths: the files of all splits, in order
        image_size: see :func:`read_image`; None requires that all images have the same size
        bad: files that are known to be bad, by position in ``paths``; they are not opened
        open_image: opens one of ``paths``
        advance: called with the number of images of each finished block, also of those finished before

    Raises:
        UserError: two files differ in size; the message names them.
        OSError: the disk of ``blocks`` is full or not writable.
    """

    def decode(block: range) -> int:
        images, reasons = np.empty((len(block), *blocks.shape), np.uint8), {}
        for row, i in enumerate(block):
            try:
                if i in bad:
                    raise UserError(bad[i])
                image = read_image(paths[i], image_size, open_image)
            except UserError as error:
                reasons[i] = str(error)
                continue
            if image.shape != blocks.shape:
                raise UserError(
                    f"images differ in size: {paths[i]} is {_size(image.shape)}, the first image "
                    f"{_size(blocks.shape)}; set --image-size to resize them to one size"
                )
            images[row] = image
        blocks.write(block.start, images, reasons)
        return len(block)

    todo, first = [], 0
    size = max(1, min(BLOCK_IMAGES, BLOCK_BYTES // math.prod(blocks.shape)))
    for count in blocks.counts.values():  # no block has images of two splits
        for start in range(first, first + count, size):
            block = range(start, min(start + size, first + count))
            advance(len(block)) if start in blocks.finished else todo.append(block)
        first += count
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        try:
            for done in pool.map(decode, todo):
                advance(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def image_shape(
    paths: Sequence[str], image_size: int | None, bad: Mapping[int, str], open_image: OpenImage = open_file
) -> tuple[int, int, int]:
    """Return channels, height and width of the first image that can be decoded, which is the shape of all images.

    Args:
        bad: files that are not opened, by position in ``paths``

    Raises:
        UserError: no image can be decoded.
    """
    if image_size is not None:
        return 3, image_size, image_size
    reasons = dict(bad)
    for i, path in enumerate(paths):
        if i not in reasons:
            try:
                return read_image(path, None, open_image).shape
            except UserError as error:
                reasons[i] = str(error)
    raise bad_images_error(reasons)


def bad_images_error(reasons: Mapping[int, str]) -> UserError:
    """Return the error that names bad files, by position, up to :data:`NAMED_FILES` of them."""
    if len(reasons) == 1:
        return UserError(f"{next(iter(reasons.values()))}; --bad-images skip leaves it out")
    return UserError(
        f"{len(reasons):,} images cannot be used (--bad-images skip leaves them out): "
        + some_of([reasons[i] for i in sorted(reasons)])
    )


def some_of(items: Sequence[str]) -> str:
    """Join up to :data:`NAMED_FILES` items by semicolons, and count the rest."""
    rest = len(items) - NAMED_FILES
    return "; ".join(items[:NAMED_FILES]) + (f"; and {rest:,} more" if rest > 0 else "")


def read_image(path: str | Path, image_size: int | None = None, open_image: OpenImage = open_file) -> np.ndarray:
    """Decode one file into uint8 (3, H, W) RGB.

    The EXIF orientation is applied. An animation gives its first frame. Transparent pixels are blended with white.
    16-bit grey is scaled to 8 bits. Palette, grey and CMYK images are converted.

    Args:
        image_size: scale the shorter side to this many pixels (antialiased, bilinear) and crop the centre square

    Raises:
        UserError: the file cannot be decoded, has more than :data:`MAX_PIXELS`, more than its pixels need of
            :data:`MAX_TILE_BYTES` or :data:`MAX_SCAN_PIXELS`, or holds floating-point pixels.
    """
    try:
        with open_image(path) as opened, Image.open(opened, formats=FORMATS) as file:
            if file.format == "PNG":
                _check_png(opened)
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"it claims {file.width}x{file.height} pixels, more than {MAX_PIXELS:,}")
            if file.format == "TIFF":
                _check_tiles(file)
            if file.format == "JPEG" and "progressive" in file.info:
                _check_scans(file, opened)
            with _one_large_image if file.width * file.height > LARGE_PIXELS else contextlib.nullcontext():
                file.load()
                image = _to_rgb(_apply_orientation(file))
    except UnidentifiedImageError:
        raise UserError(f"cannot decode {path}: it is damaged or not an image ({', '.join(FORMATS)})") from None
    # On a damaged file Pillow raises whatever error its parser meets: OSError, SyntaxError, struct.error, KeyError, ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)  # str(error) of an OSError repeats the path
        raise UserError(f"cannot decode {path}: {reason or type(error).__name__}") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _check_png(file: BinaryIO) -> None:
    """Raise ValueError if the CRC-32 of a chunk is wrong.

    Pillow relies on the checksum at the end of the compressed pixels, but its decoder can stop before it.
    """
    position = file.tell()
    file.seek(8)
    while head := file.read(8):
        remaining, crc = int.from_bytes(head[:4], "big"), zlib.crc32(head[4:])
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            remaining, crc = remaining - len(block), zlib.crc32(block, crc)
        if file.read(4) != crc.to_bytes(4, "big"):
            raise ValueError(f"its {head[4:].decode('latin1')} chunk is damaged or cut short")
        if head[4:] == b"IEND":
            break
    file.seek(position)


def _check_tiles(file: Image.Image) -> None:
    """Raise ValueError if a tile or strip of a TIFF file is too large."""
    tags = file.tag_v2  # pyright: ignore[reportAttributeAccessIssue] - of TiffImageFile
    width, height = tags.get(_TILE_WIDTH, file.width), tags.get(_TILE_LENGTH, file.height)
    bits = tags.get(_BITS_PER_SAMPLE, (1,))
    size = width * height * max(sum(bits), max(bits) * tags.get(_SAMPLES_PER_PIXEL, 1)) // 8
    if size > MAX_TILE_BYTES:
        raise ValueError(f"it claims a tile or strip of {size:,} bytes, more than {MAX_TILE_BYTES:,}")


def _check_scans(file: Image.Image, opened: BinaryIO) -> None:
    """Raise ValueError if a progressive JPEG file takes too long to decode: each scan passes over all pixels."""
    position = opened.tell()
    opened.seek(0)
    scans = opened.read().count(b"\xff\xda")  # the marker of a scan; compressed data cannot contain it
    opened.seek(position)
    if scans * file.width * file.height > MAX_SCAN_PIXELS:
        raise ValueError(f"it has {scans:,} scans of {file.width}x{file.height} pixels; save it again")


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF data are damaged; the pixels may still be good
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    rows = max(1, BAND_PIXELS // image.width)
    if image.height <= rows:
        return _band_to_rgb(image)
    converted = Image.new("RGB", image.size)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        converted.paste(_band_to_rgb(band), (0, top))
    return converted


def _band_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _size(shape: tuple[int, ...]) -> str:
    """Return the size of an image of shape (C, H, W) as WxH."""
    return f"{shape[2]}x{shape[1]}"
