"""The readers of files under damage. Each target gives sound files, and a check of what a damaged one of them became.

A check returns where the content was accepted and right, raises UserError where it was refused, and anything else is a
finding. ``python readers.py SEED SECONDS ITERATIONS [TARGET...]`` runs them in this process, with little memory to
spare and a clock that ends it, and prints one JSON line a target. Damage is a function of (target, seed, iteration).
"""

import base64
import hashlib
import io
import json
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from helpers.mutate_files import cut, flip, mutate
from ltat_fast import config
from ltat_fast.data import load_dataset
from ltat_fast.data.cache import read_cache, write_cache
from ltat_fast.data.cifar import batch
from ltat_fast.data.decode import MAX_PIXELS, read_image
from ltat_fast.data.download import Archive, fetch, unpack
from ltat_fast.data.folder import scan_tiny_imagenet
from ltat_fast.data.svhn import read_svhn
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.runs.weights import read_weights, write_weights

sys.path.append(str(Path(__file__).parents[1]))
from helpers.image_trees import write_folder, write_tiny_imagenet

MEMORY = 2 * 2**30  # bytes beyond what the imports took; a picture of MAX_PIXELS needs about half
HANG = 20  # seconds for one file
Check = Callable[[bytes, bytes], None]


def zip_files(folder: Path) -> tuple[list[bytes], Check]:
    """Behind the md5 nothing damaged is accepted; before it nothing leaves the folder or comes out changed."""
    members = {f"top/{name}": content for name, content in _pictures().items()} | {"top/sub/text.txt": b"text" * 50}
    originals = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as archive:
            for name, content in members.items():
                archive.writestr(zipfile.ZipInfo(name), content, method)
        originals.append(buffer.getvalue())

    def check(content: bytes, original: bytes) -> None:
        inside = folder / "inside"
        shutil.rmtree(inside, ignore_errors=True)
        inside.mkdir()
        (inside / "a.zip").write_bytes(content)
        try:
            fetch(Archive("http://localhost/a.zip", _md5(original)), inside, False, _silent)
        except UserError:
            pass
        else:
            assert content == original
        try:
            unpack(inside / "a.zip", inside, "top", _silent)
            for path in (inside / "top").rglob("*"):
                assert not path.is_symlink()
                assert path.is_dir() or path.read_bytes() in (*members.values(), b""), "not what a CRC-32 let through"
        finally:
            assert {path.name for path in folder.iterdir()} == {"inside"}
            assert {path.name for path in inside.iterdir()} <= {"a.zip", "top", "top.lock"}

    return originals, check


def images(folder: Path) -> tuple[list[bytes], Check]:
    """An array of a size that is allowed, whatever the damage."""

    def check(content: bytes, original: bytes) -> None:
        (folder / "image").write_bytes(content)
        image = read_image(folder / "image")
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[0] == 3
        assert 0 < image[0].size <= MAX_PIXELS
        assert read_image(folder / "image", 6).shape == (3, 6, 6)

    return list(_pictures().values()), check


def png_files(folder: Path) -> tuple[list[bytes], Check]:
    """The pixels of a PNG have a CRC-32: they come out right, or not at all."""
    pictures = [content for name, content in _pictures().items() if name.endswith(".png")]
    pixels = {}
    for content in pictures:
        (folder / "image").write_bytes(content)
        pixels[content] = read_image(folder / "image")

    def check(content: bytes, original: bytes) -> None:
        (folder / "image").write_bytes(content)
        assert np.array_equal(read_image(folder / "image"), pixels[original])

    return pictures, check


def image_folders(folder: Path) -> tuple[list[bytes], Check]:
    """A tree with one damaged image: all labels as they were, or the file named."""
    root = write_folder(folder / "tree", {"a": (3, 1), "b": (2, 1)})
    target = root / "train" / "b" / "1.png"

    def check(content: bytes, original: bytes) -> None:
        target.write_bytes(content)
        try:
            dataset = load_dataset("imagefolder-lt", root, image_size=4, cache_dir=folder / "cache", report=_silent)
        except UserError as error:
            if str(target) not in str(error):
                raise AssertionError("the damaged file is not named") from error
            raise
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
        assert dataset.train.images[:4, 0, 0, 0].tolist() == [0, 1, 2, 3]

    return list(_pictures().values()), check


def annotations(folder: Path) -> tuple[list[bytes], Check]:
    """Tiny-ImageNet's list of validation labels: every label as it was, or refused."""
    root = write_tiny_imagenet(folder / "tiny")
    path = root / "val" / "val_annotations.txt"
    original = scan_tiny_imagenet(root).test

    def check(content: bytes, _: bytes) -> None:
        path.write_bytes(content)
        assert scan_tiny_imagenet(root).test == original

    return [path.read_bytes()], check


def caches(folder: Path) -> tuple[list[bytes], Check]:
    """Decoded images: every byte as it was, or decoded again."""
    rng = np.random.RandomState(0)
    path = folder / "key.safetensors"
    contents = {}
    for count in (3, 40):
        arrays = {"train.labels": np.arange(count), "train.images": rng.randint(0, 256, (count, 3, 4, 4), np.uint8)}
        write_cache(path, "key", arrays)
        contents[path.read_bytes()] = arrays

    def check(content: bytes, original: bytes) -> None:
        path.write_bytes(content)
        if (read := read_cache(path, "key")) is None:
            raise UserError("decoded again")
        arrays = contents[original]
        assert read.keys() == arrays.keys()
        assert all(np.array_equal(read[k], arrays[k]) and read[k].dtype == arrays[k].dtype for k in arrays)

    return list(contents), check


def checkpoints(folder: Path) -> tuple[list[bytes], Check]:
    """Weights and the state of a run: every bit and the card as they were, or refused."""
    path = folder / "resume.safetensors"
    generator = torch.Generator().manual_seed(0)
    contents = {}
    for size in (3, 40):
        tensors = {"model.weight": torch.randn(size, 7, generator=generator), "model.count": torch.tensor(size)}
        tensors |= {"momentum.weight": torch.randn(size, 7, generator=generator).bfloat16(), "none": torch.empty(0, 3)}
        card = {"epoch": size, "step": 7, "best": {"test_pgd20": 41.5, "é": [None, True]}, "sums": {"loss": 0.1}}
        write_weights(path, tensors, card)
        contents[path.read_bytes()] = tensors, card

    def check(content: bytes, original: bytes) -> None:
        path.write_bytes(content)
        tensors, card = contents[original]
        read, read_card = read_weights(path)
        assert read_card == card
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors)

    return list(contents), check


def cifar_batches(folder: Path) -> tuple[list[bytes], Check]:
    """Behind the checksums, which are not asked here: arrays of a batch, or refused; nothing is run."""
    rng = np.random.RandomState(0)
    rows = rng.randint(0, 256, (4, 3072)).astype(np.uint8)
    originals = [pickle.dumps({"data": rows, "labels": [0, 9, 5, 5]}, protocol) for protocol in (0, 2, 4)]
    folder = Path("data_batch_1")

    def check(content: bytes, original: bytes) -> None:
        pixels, labels = batch(content, folder, 10)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(labels), 3, 32, 32)
        assert all(0 <= label < 10 for label in labels)

    return originals, check


def svhn_files(folder: Path) -> tuple[list[bytes], Check]:
    """The arrays as they were, or refused. SciPy's reader crashes on damage: the checksum has to come before it."""
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    path, originals = folder / "train_32x32.mat", []
    for compressed in (False, True):
        savemat(path, {"X": pixels, "y": np.array([[10], [1], [9], [5]])}, do_compression=compressed)
        originals.append(path.read_bytes())

    def check(content: bytes, original: bytes) -> None:
        path.write_bytes(content)
        pictures, labels = read_svhn(
            fetch(Archive(f"http://localhost/{path.name}", _md5(original)), folder, False, _silent)
        )
        assert np.array_equal(pictures, pixels.transpose(3, 2, 0, 1))
        assert labels.tolist() == [0, 1, 9, 5]

    return originals, check


def configurations(folder: Path) -> tuple[list[bytes], Check]:
    """RUN/config.json: what is read can be written, and is what it says."""
    path = folder / "config.json"
    flags = ([], ["--dataset", "cifar100-lt", "--method", "robal"], ["--data-dir", "d", "--lr", "0.03", "--seed", "7"])
    originals = [json.dumps(config.to_json(*parse_args(list(f)))).encode() for f in flags]

    def check(content: bytes, original: bytes) -> None:
        path.write_bytes(content)
        settings, method = config.load(folder)
        again = json.loads(json.dumps(config.to_json(settings, method)))
        assert config.from_json(again) == (settings, method)

    return originals, check


TARGETS = (zip_files, images, png_files, image_folders, annotations, caches, checkpoints, cifar_batches, svhn_files)
TARGETS += (configurations,)
PLAIN = {"png_files"}  # flips and cuts alone: a splice from another PNG can be a sound PNG


def _pictures() -> dict[str, bytes]:
    """Small images of every format and kind of pixel."""
    rng = np.random.RandomState(0)
    colour = Image.fromarray(rng.randint(0, 256, (9, 7, 3)).astype(np.uint8))
    deep = Image.fromarray(rng.randint(0, 65536, (9, 7)).astype(np.uint16))
    frames = {"save_all": True, "append_images": [colour.rotate(90, expand=False)]}
    kinds = [("a.png", colour, {}), ("a.jpg", colour, {}), ("a.gif", colour, frames), ("a.bmp", colour, {})]
    kinds += [("a.tif", colour, {}), ("lzw.tif", colour, {"compression": "tiff_lzw"}), ("a.webp", colour, frames)]
    kinds += [("a.ppm", colour, {}), ("deep.png", deep, {}), ("cmyk.jpg", colour.convert("CMYK"), {})]
    kinds += [("progressive.jpg", colour, {"progressive": True}), ("alpha.png", colour.convert("RGBA"), {})]
    kinds += [("palette.png", colour.convert("P"), {"transparency": 3}), ("still.webp", colour, {"lossless": True})]
    pictures = {}
    for name, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()["." + name.split(".")[1]], **options)
        pictures[name] = buffer.getvalue()
    return pictures


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _silent(line: str) -> None:
    pass


def fuzz(make: Callable, seed: int, seconds: float, iterations: int) -> dict:
    """Damage files until the time or the iterations are used up. The counts, and what was found, most at once 5."""
    name, begin = make.__name__, time.monotonic()
    result = {"target": name, "tried": 0, "accepted": 0, "refused": 0, "findings": []}
    with tempfile.TemporaryDirectory() as folder:
        originals, check = make(Path(folder))
        for original in originals:
            check(original, original)
        while result["tried"] < iterations and time.monotonic() - begin < seconds and len(result["findings"]) < 5:
            rng = random.Random(f"{name}/{seed}/{result['tried']}")
            original = rng.choice(originals)
            if name in PLAIN:
                damaged = bytearray(original)
                rng.choice((flip, cut))(damaged, rng)
                damaged = bytes(damaged)
            else:
                damaged = mutate(original, originals, rng)
            if damaged in originals:  # several kinds of damage can undo each other, or make one of the others
                original = damaged
            signal.alarm(HANG)  # nobody hears it: it ends this process
            try:
                check(damaged, original)
                result["accepted"] += 1
            except UserError:
                result["refused"] += 1
            except Exception:
                result["findings"].append({"file": base64.b85encode(damaged).decode(), "error": traceback.format_exc()})
            signal.alarm(0)
            result["tried"] += 1
    return result


def main(seed: int, seconds: float, iterations: int, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    for make in TARGETS:
        if not names or make.__name__ in names:
            print(json.dumps(fuzz(make, seed, seconds, iterations)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
