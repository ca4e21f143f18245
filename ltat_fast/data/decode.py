"""Image files to one uint8 array."""

import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ltat_fast.errors import UserError

EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm")
)
"""A file without one of these is not taken for an image."""
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What a file may hold, whatever its extension says."""
MAX_PIXELS = 2**26
"""A larger picture is refused before its pixels are decoded: a few kilobytes can claim gigabytes."""


def decode_images(
    paths: list[str], image_size: int | None, report: Callable[[str], None] = lambda line: None
) -> np.ndarray:
    """Decode files into uint8 (N, 3, H, W).

    Threads suffice: Pillow leaves the interpreter lock while it decodes, converts and resizes.

    Args:
        image_size: see :func:`read_image`; None demands that all images have one size

    Raises:
        UserError: a file that cannot be decoded, or two of different size; the message names them.
    """
    first = read_image(paths[0], image_size)
    images = np.empty((len(paths), *first.shape), np.uint8)

    def decode(start: int) -> int:
        stop = min(start + 256, len(paths))
        for i in range(start, stop):
            image = read_image(paths[i], image_size)
            if image.shape != first.shape:
                raise UserError(
                    f"images differ in size: {paths[0]} is {_size(first)}, {paths[i]} is {_size(image)}; "
                    "give --image-size to bring them to one"
                )
            images[i] = image
        return stop

    said = time.monotonic()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        try:
            for done in pool.map(decode, range(0, len(paths), 256)):
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    report(f"decoded {done:,} of {len(paths):,} images")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return images


def read_image(path: str | Path, image_size: int | None = None) -> np.ndarray:
    """Decode one file into uint8 (3, H, W) RGB.

    The orientation that a camera noted is applied; of an animation the first frame is taken; transparency shows white;
    16-bit grey is scaled to 8 bits; palette, grey and CMYK are converted.

    Args:
        image_size: scale the shorter side to this many pixels (antialiased, bilinear) and cut the centre square

    Raises:
        UserError: the file cannot be decoded, claims more than :data:`MAX_PIXELS`, or holds floating-point pixels.
    """
    try:
        with open(path, "rb") as opened, Image.open(opened, formats=FORMATS) as file:
            if file.format == "PNG":
                _check_png(opened)
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"it claims {file.width}x{file.height} pixels, more than {MAX_PIXELS:,}")
            file.load()
            image = _to_rgb(_upright(file))
    except UnidentifiedImageError:
        raise UserError(f"cannot decode {path}: it is damaged, or no image ({', '.join(FORMATS)})") from None
    # Pillow answers a damaged file with whatever its parser ran into: OSError, SyntaxError, struct.error, KeyError...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)  # without the path once more
        raise UserError(f"cannot decode {path}: {reason or type(error).__name__}") from error
    if image_size is not None and image.size != (image_size, image_size):
        image = ImageOps.fit(image, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _check_png(file: BinaryIO) -> None:
    """The CRC-32 of every chunk. Pillow relies on the checksum at the end of the pixels, and can stop short of it."""
    place = file.tell()
    file.seek(8)
    while head := file.read(8):
        remaining, crc = int.from_bytes(head[:4], "big"), zlib.crc32(head[4:])
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            remaining, crc = remaining - len(block), zlib.crc32(block, crc)
        if file.read(4) != crc.to_bytes(4, "big"):
            raise ValueError(f"its {head[4:].decode('latin1')} chunk is damaged or cut short")
        if head[4:] == b"IEND":
            break
    file.seek(place)


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged note beside sound pixels
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("its pixels exceed 16 bits; save it with 8 or 16 bits")
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _size(image: np.ndarray) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
