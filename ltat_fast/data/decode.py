"""Decode image files into one uint8 array."""

import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltat_fast.errors import UserError

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""extensions of the files that count as images"""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""formats that are decoded; the content of a file decides, not its extension"""
MAX_PIXELS = 2**26
"""limit on the pixels of an image, checked before decoding, because a file of a few kilobytes can claim gigabytes"""
NAMED_FILES = 20
"""number of bad files that a message names; the others are counted"""

OpenImage = Callable[[str | Path], BinaryIO]


def open_file(path: str | Path) -> BinaryIO:
    """Open an image that is a file of its own."""
    return open(path, "rb")


def decode_images(
    paths: list[str],
    image_size: int | None,
    report: Callable[[str], None] = lambda line: None,
    bad: dict[int, str] | None = None,
    open_image: OpenImage = open_file,
) -> np.ndarray:
    """Decode files into uint8 (N, 3, H, W), in parallel.

    Threads are enough: Pillow releases the GIL while it decodes, converts and resizes.

    Args:
        image_size: see :func:`read_image`; None requires that all images have the same size
        report: called with a line of progress every ten seconds
        bad: None refuses bad files. A dict leaves them out: the reason of each is added under its position in
            ``paths``, files whose position it holds already are not opened, and N counts the others.
        open_image: opens one of ``paths``

    Raises:
        UserError: files cannot be decoded, or two files differ in size; the message names them. Or no file is left.
    """
    refuse, bad = bad is None, {} if bad is None else bad
    first_path, first = _first_image(paths, image_size, bad, open_image)
    images = np.empty((len(paths), *first.shape), np.uint8)

    def decode(start: int) -> int:
        stop = min(start + 256, len(paths))
        for i in range(start, stop):
            if i in bad:
                continue
            try:
                image = read_image(paths[i], image_size, open_image)
            except UserError as error:
                bad[i] = str(error)
                continue
            if image.shape != first.shape:
                raise UserError(
                    f"images differ in size: {first_path} is {_size(first)}, {paths[i]} is {_size(image)}; "
                    "set --image-size to resize them to one size"
                )
            images[i] = image
        return stop

    last_report = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        try:
            for done in pool.map(decode, range(0, len(paths), 256)):
                if time.monotonic() - last_report > 10:
                    last_report = time.monotonic()
                    report(f"decoded {done:,} of {len(paths):,} images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if not bad:
        return images
    if refuse:
        raise bad_images_error(bad)
    good = [i for i in range(len(paths)) if i not in bad]
    for row, i in enumerate(good):  # in place: the images may fill most of the memory
        images[row] = images[i]
    return images[: len(good)]


def decoded_bytes(paths: list[str], image_size: int | None, open_image: OpenImage = open_file) -> int:
    """Return the bytes that the decoded ``paths`` fill, by the size of the first image that can be decoded.

    Raises UserError if no image can be decoded.
    """
    one = 3 * image_size**2 if image_size is not None else _first_image(paths, image_size, {}, open_image)[1].nbytes
    return len(paths) * one


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


def _first_image(
    paths: list[str], image_size: int | None, bad: dict[int, str], open_image: OpenImage
) -> tuple[str, np.ndarray]:
    """Return the first image that can be decoded, with its path; add those before it to ``bad``."""
    for i, path in enumerate(paths):
        if i not in bad:
            try:
                return path, read_image(path, image_size, open_image)
            except UserError as error:
                bad[i] = str(error)
    raise bad_images_error(bad)


def read_image(path: str | Path, image_size: int | None = None, open_image: OpenImage = open_file) -> np.ndarray:
    """Decode one file into uint8 (3, H, W) RGB.

    The EXIF orientation is applied. An animation gives its first frame. Transparent pixels are blended with white.
    16-bit grey is scaled to 8 bits. Palette, grey and CMYK images are converted.

    Args:
        image_size: scale the shorter side to this many pixels (antialiased, bilinear) and crop the centre square

    Raises:
        UserError: the file cannot be decoded, has more than :data:`MAX_PIXELS`, or holds floating-point pixels.
    """
    try:
        with open_image(path) as opened, Image.open(opened, formats=FORMATS) as file:
            if file.format == "PNG":
                _check_png(opened)
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"it claims {file.width}x{file.height} pixels, more than {MAX_PIXELS:,}")
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


def _apply_orientation(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the EXIF data are damaged; the pixels may still be good
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
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


def _size(image: np.ndarray) -> str:
    """Return the size of a (C, H, W) image as WxH."""
    return f"{image.shape[2]}x{image.shape[1]}"
