"""Decoded pixels of unusual image files, compared with values computed by hand."""

import struct
import zlib
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from PIL import Image

from ltat_fast.data import decode as decoder
from ltat_fast.data.decode import MAX_PIXELS, decode_into, image_shape, read_image
from ltat_fast.data.partial import InMemory
from ltat_fast.errors import UserError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def save(path, mode, pixels, **options):
    """Write a one-row image."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    image.save(path, **options)
    return path


def row(path, **options):
    return [tuple(pixel) for pixel in read_image(path, **options)[:, 0].T.tolist()]


def test_rgb_grey_and_bilevel(tmp_path):
    assert row(save(tmp_path / "a.png", "RGB", [RED, (1, 2, 3)])) == [RED, (1, 2, 3)]
    assert row(save(tmp_path / "b.png", "L", [0, 77])) == [(0, 0, 0), (77, 77, 77)]
    assert row(save(tmp_path / "c.png", "1", [0, 255])) == [(0, 0, 0), WHITE]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([2, 0, 1])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "holes.png", transparency=0)
    assert row(tmp_path / "plain.png") == [BLUE, RED, GREEN]
    assert row(tmp_path / "holes.png") == [BLUE, WHITE, GREEN]


def test_transparent_pixels_become_white(tmp_path):
    assert row(save(tmp_path / "a.png", "RGBA", [(*RED, 255), (*RED, 0), (0, 0, 0, 51)])) == [RED, WHITE, (204,) * 3]
    assert row(save(tmp_path / "b.png", "LA", [(10, 255), (10, 0)])) == [(10, 10, 10), WHITE]
    assert row(save(tmp_path / "c.png", "RGB", [RED, GREEN], transparency=RED)) == [WHITE, GREEN]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        assert row(tmp_path / name) == [(0,) * 3, (1,) * 3, (128,) * 3, WHITE]


def test_cmyk(tmp_path):
    save(tmp_path / "a.tif", "CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)])
    assert row(tmp_path / "a.tif") == [WHITE, RED, (0, 0, 0)]
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read_image(tmp_path / "a.jpg")[:, 8, 8].astype(int) - RED).max() <= 3


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (2, 2), colour) for colour in (GREEN, RED, BLUE)]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        lossless = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
        assert row(tmp_path / name) == [GREEN, GREEN]


def test_exif_orientation_is_applied_and_damaged_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    image = Image.new("RGB", (2, 1))
    image.putdata([RED, BLUE])
    image.save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png")[:, :, 0].T.tolist() == [list(RED), list(BLUE)]
    image.save(tmp_path / "b.png", exif=b"Exif\x00\x00nonsense")
    assert row(tmp_path / "b.png") == [RED, BLUE]


def test_the_content_decides_the_format_not_the_extension(tmp_path):
    image = Image.new("RGB", (1, 1), GREEN)
    image.save(tmp_path / "a.jpg", format="PNG")
    assert row(tmp_path / "a.jpg") == [GREEN]


def test_image_size_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    wide = np.zeros((4, 12, 3), np.uint8)
    wide[:, :4], wide[:, 4:8], wide[:, 8:] = RED, GREEN, BLUE
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    for name in ("wide.png", "tall.png"):
        assert (read_image(tmp_path / name, 4) == np.array(GREEN)[:, None, None]).all()
        assert read_image(tmp_path / name, 9).shape == (3, 9, 9)
    checks = np.indices((8, 8)).sum(0) % 2 * 255  # halving must average, not pick
    Image.fromarray(checks.astype(np.uint8)).save(tmp_path / "checks.png")
    assert np.abs(read_image(tmp_path / "checks.png", 4)[:, 1:-1, 1:-1].astype(int) - 128).max() <= 2
    assert (read_image(save(tmp_path / "one.png", "RGB", [BLUE]), 5) == np.array(BLUE)[:, None, None]).all()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path, width, height, depth, colour, rows, extra=b""):
    """Write a PNG by hand. ``rows``: pixel rows with their filter bytes. ``extra``: chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b""))
    return path


def claims(path, width, height):
    """Write a PNG whose header claims a size for which it has no data."""
    return png(path, width, height, 8, 2, bytes(100))


def test_sixteen_bit_colour_keeps_the_high_byte(tmp_path):
    deep = b"\0" + struct.pack(">6H", 0, 257, 65535, 32768, 255, 256)
    assert row(png(tmp_path / "rgb.png", 2, 1, 16, 2, deep)) == [(0, 1, 255), (128, 0, 1)]
    assert row(png(tmp_path / "rgba.png", 1, 1, 16, 6, b"\0" + struct.pack(">4H", 257, 65535, 0, 0))) == [WHITE]


def test_palette_with_half_transparent_colours(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, 0, 0, 0])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "a.png", transparency=bytes([255, 0, 51]))
    assert row(tmp_path / "a.png") == [RED, WHITE, (204,) * 3]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm"])
def test_one_pixel(tmp_path, name):
    Image.new("RGB", (1, 1), (200, 200, 200)).save(tmp_path / name)
    assert read_image(tmp_path / name).shape == (3, 1, 1)
    assert np.abs(read_image(tmp_path / name, 7).astype(int) - 200).max() <= 2
    assert read_image(tmp_path / name, 7).shape == (3, 7, 7)


def test_decompression_bombs_are_bounded(tmp_path):
    """100 MB in 100 KB: compressed text in a PNG is refused, and pixels beyond the image size are not decoded."""
    zeros = zlib.compress(bytes(100_000_000), 9)
    notes = {b"zTXt": b"a\0\0", b"iCCP": b"a\0\0", b"iTXt": b"a\0\1\0\0\0"}
    for kind, head in notes.items():
        with pytest.raises(UserError, match=r"note.png: Decompressed data too large"):
            read_image(png(tmp_path / "note.png", 1, 1, 8, 0, b"\0\7", chunk(kind, head + zeros)))
    bomb = png(tmp_path / "long.png", 1, 1, 8, 0, b"\0\7")
    bomb.write_bytes(bomb.read_bytes().replace(zlib.compress(b"\0\7"), zeros))  # its checksum is wrong too
    with pytest.raises(UserError, match=r"cannot decode .*long.png"):
        read_image(bomb)
    assert row(png(tmp_path / "long.png", 1, 1, 8, 0, b"\0\7" + bytes(100_000_000))) == [(7, 7, 7)]
    Image.new("L", (1, 1)).save(tmp_path / "frame.gif")
    content = bytearray((tmp_path / "frame.gif").read_bytes())
    frame = content.index(b",", 13)
    content[frame + 5 : frame + 9] = struct.pack("<HH", 65535, 65535)  # in an image that claims 1x1
    (tmp_path / "frame.gif").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot decode .*frame.gif"):
        read_image(tmp_path / "frame.gif")


def test_a_damaged_png_that_pillow_accepts_is_refused(tmp_path):
    """Uncompressed pixels without the flag of the last block: the decoder stops before it checks the checksum."""
    path = png(tmp_path / "a.png", 2, 1, 8, 0, b"\0\7\7")
    content = bytearray(path.read_bytes())
    pixels = content.index(b"IDAT") + 4
    content[pixels:] = zlib.compress(b"\0\7\7", 0) + content[content.index(b"IEND") - 8 :]
    content[pixels - 8 : pixels - 4] = (len(zlib.compress(b"\0\7\7", 0))).to_bytes(4, "big")
    end = content.index(b"IEND") - 8
    content[end : end + 4] = zlib.crc32(content[pixels - 4 : end]).to_bytes(4, "big")
    path.write_bytes(content)
    assert row(path) == [(7, 7, 7)] * 2
    content[pixels + 2] ^= 1
    content[pixels + 8] ^= 1
    path.write_bytes(content)
    with Image.open(path) as image:
        assert list(image.getdata()) == [6, 7]
    with pytest.raises(UserError, match=r"a.png: its IDAT chunk is damaged"):
        read_image(path)


def test_images_without_pixels_are_refused(tmp_path):
    (tmp_path / "a.ppm").write_bytes(b"P6\n0 5\n255\n")
    (tmp_path / "a.gif").write_bytes(b"GIF89a\0\0\0\0\0\0\0;")
    for path in (png(tmp_path / "a.png", 0, 0, 8, 2, b""), tmp_path / "a.ppm", tmp_path / "a.gif", tmp_path):
        with pytest.raises(UserError, match=f"cannot decode {path}"):
            read_image(path)


def test_the_error_names_the_file_that_cannot_be_decoded(tmp_path, monkeypatch):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8)).save(whole)
    bad = {
        "cut.jpg": whole.read_bytes()[: whole.stat().st_size // 2],
        "empty.png": b"",
        "text.png": b"this is not an image",
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"cannot decode .*{name}"):
            read_image(tmp_path / name)
    for name, reason in (
        ("text.png", "it is damaged or not an image (PNG, JPEG, BMP, GIF, TIFF, WEBP, PPM)"),
        ("missing.png", "No such file or directory"),
    ):
        with pytest.raises(UserError) as refusal:
            read_image(tmp_path / name)
        assert str(refusal.value) == f"cannot decode {tmp_path / name}: {reason}", "the file is named once"
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "convert", Mock(side_effect=KeyError))
        with pytest.raises(UserError, match=r"whole.jpg: KeyError$"):
            read_image(whole)
    for width, height in ((8193, 8192), (60000, 60000)):
        with pytest.raises(UserError, match=r"cannot decode .*bomb.png"):
            read_image(claims(tmp_path / "bomb.png", width, height))
    assert MAX_PIXELS < 8193 * 8192
    Image.fromarray(np.ones((1, 1), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match=r"float.tif: its pixels are floating-point"):
        read_image(tmp_path / "float.tif")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_gives_an_image_or_a_user_error(tmp_path):
    """1,000 files with random bytes overwritten or cut off never give another exception or another size."""
    rng = np.random.RandomState(0)
    image = Image.fromarray(rng.randint(0, 255, (8, 8, 3), np.uint8))
    originals = []
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.tif", "a.webp", "a.ppm"):
        image.save(tmp_path / name)
        originals.append((tmp_path / name).read_bytes())
    refused = 0
    for trial in range(1000):
        data = bytearray(originals[trial % len(originals)])
        for _ in range(rng.randint(1, 6)):
            data[rng.randint(len(data))] = rng.randint(256)
        if rng.rand() < 0.3:
            del data[rng.randint(1, len(data)) :]
        (tmp_path / "damaged.png").write_bytes(data)
        try:
            assert read_image(tmp_path / "damaged.png", 8).shape == (3, 8, 8)
        except UserError:
            refused += 1
    assert 250 < refused < 1000


def decode(paths, image_size):
    """Decode ``paths`` as the training images of a dataset, into memory."""
    blocks = InMemory({"train": len(paths)}, image_shape(paths, image_size, {}))
    decode_into(blocks, paths, image_size, {})
    assert blocks.bad == {}
    return blocks.finish()["train"]


def test_many_images_keep_their_order_and_sizes_must_agree(tmp_path):
    paths = [save(tmp_path / f"{i}.png", "L", [i % 256, i // 256]) for i in range(600)]
    images = decode(paths, None)
    assert images.shape == (600, 3, 1, 2)
    assert [int(a) + 256 * int(b) for a, b in images[:, 0, 0]] == list(range(600))
    odd = save(tmp_path / "odd.png", "L", [1, 2, 3])
    with pytest.raises(UserError, match=r"odd.png is 3x1, the first image 2x1; set --image-size"):
        decode([*paths, odd], None)
    assert decode([*paths, odd], 4).shape == (601, 3, 4, 4)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "I;16"])
def test_a_conversion_in_bands_gives_the_same_pixels(tmp_path, monkeypatch, mode):
    """A conversion of a large image at once would need gigabytes."""
    rng = np.random.RandomState(0)
    if mode == "I;16":
        image = Image.fromarray(rng.randint(0, 65536, (9, 7)).astype(np.uint16))
    else:
        image = Image.fromarray(rng.randint(0, 256, (9, 7, 3)).astype(np.uint8)).convert(mode)
    options = {"transparency": 3} if mode == "P" else {}
    image.save(path := tmp_path / ("a.tif" if mode == "CMYK" else "a.png"), **options)
    whole = read_image(path)
    monkeypatch.setattr(decoder, "BAND_PIXELS", 14)
    monkeypatch.setattr(decoder, "LARGE_PIXELS", 10)
    assert np.array_equal(read_image(path), whole)


def test_a_progressive_jpeg_of_many_scans_is_refused(tmp_path, monkeypatch):
    """Each scan takes as long as a whole image, and needs a few bytes of the file."""
    path = tmp_path / "a.jpg"
    Image.new("L", (64, 64), 100).save(path, progressive=True)
    assert read_image(path).shape == (3, 64, 64)
    content = path.read_bytes()
    scan = content[content.rindex(b"\xff\xda") : -2]
    path.write_bytes(content[:-2] + 300 * scan + content[-2:])
    monkeypatch.setattr(decoder, "MAX_SCAN_PIXELS", 300 * 64 * 64)
    with pytest.raises(UserError, match=r"a\.jpg: it has 30\d scans of 64x64 pixels"):
        read_image(path)


def test_a_tiff_whose_tile_is_far_larger_than_the_image_is_refused(tmp_path):
    tags = {256: 8, 257: 8, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 32768, 324: 8, 325: 16}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "a.tif").write_bytes(file)
    with pytest.raises(UserError, match="it claims a tile or strip of 1,073,741,824 bytes"):
        read_image(tmp_path / "a.tif")


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(decoder, "LARGE_PIXELS", 60)
    monkeypatch.setattr(decoder, "_one_large_image", lock := MagicMock())
    read_image(tmp_path / "a.png")
    lock.__enter__.assert_called_once()
    monkeypatch.setattr(decoder, "LARGE_PIXELS", 64)
    read_image(tmp_path / "a.png")
    lock.__enter__.assert_called_once()
