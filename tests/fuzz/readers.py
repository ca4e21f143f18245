"""Fuzz targets for the readers of files. Each target returns valid files, and a check for damaged versions of them.

A check returns if the reader accepted the file and its content is right, and raises UserError if the reader refused it.
Any other exception is a finding. ``python readers.py SEED SECONDS ITERATIONS [TARGET...]`` runs the targets in this
process, under limits of memory and time, and prints one JSON line per target. The damage is a function of (target,
seed, iteration).
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

from ltat_fast import config
from ltat_fast.data import load_dataset
from ltat_fast.data.cache import CARD, read_cache
from ltat_fast.data.cifar import load_batch
from ltat_fast.data.decode import MAX_PIXELS, read_image
from ltat_fast.data.download import Archive, fetch, unpack
from ltat_fast.data.folder import scan_tiny_imagenet
from ltat_fast.data.svhn import read_svhn
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.runs.weights import read_weights, write_weights

sys.path.append(str(Path(__file__).parents[1]))
from helpers.image_trees import write_folder, write_tiny_imagenet
from helpers.mutate_files import cut, flip, mutate

MEMORY = 2 * 2**30  # bytes in addition to the imports; an image of MAX_PIXELS needs about half
HANG = 20  # seconds of processor time per file
Check = Callable[[bytes, bytes], None]


def zip_files(folder: Path) -> tuple[list[bytes], Check]:
    """fetch() accepts no damaged archive; unpack() writes nothing outside its folder and changes no content."""
    members = {f"top/{name}": content for name, content in _images().items()} | {"top/sub/text.txt": b"text" * 50}
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
                assert path.is_dir() or path.read_bytes() in (*members.values(), b""), (
                    "content that its CRC-32 should have refused"
                )
        finally:
            assert {path.name for path in folder.iterdir()} == {"inside"}
            assert {path.name for path in inside.iterdir()} <= {"a.zip", "top", "top.lock"}

    return originals, check


def images(folder: Path) -> tuple[list[bytes], Check]:
    """The image has an allowed size, or is refused."""

    def check(content: bytes, original: bytes) -> None:
        (folder / "image").write_bytes(content)
        image = read_image(folder / "image")
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[0] == 3
        assert 0 < image[0].size <= MAX_PIXELS
        assert read_image(folder / "image", 6).shape == (3, 6, 6)

    return list(_images().values()), check


def png_files(folder: Path) -> tuple[list[bytes], Check]:
    """The pixels of a PNG, which has checksums, are right, or it is refused."""
    originals = [content for name, content in _images().items() if name.endswith(".png")]
    pixels = {}
    for content in originals:
        (folder / "image").write_bytes(content)
        pixels[content] = read_image(folder / "image")

    def check(content: bytes, original: bytes) -> None:
        (folder / "image").write_bytes(content)
        assert np.array_equal(read_image(folder / "image"), pixels[original])

    return originals, check


def image_folders(folder: Path) -> tuple[list[bytes], Check]:
    """In a tree with one damaged image all labels are right, or the error names the file."""
    root = write_folder(folder / "tree", {"a": (3, 1), "b": (2, 1)})
    target = root / "train" / "b" / "1.png"

    def check(content: bytes, original: bytes) -> None:
        target.write_bytes(content)
        try:
            dataset = load_dataset("imagefolder-lt", root, image_size=4, report=_silent)
        except UserError as error:
            if str(target) not in str(error):
                raise AssertionError("the error does not name the damaged file") from error
            raise
        finally:
            shutil.rmtree(root / ".ltat_fast_cache", ignore_errors=True)
        assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
        assert dataset.train.images[:4, 0, 0, 0].tolist() == [0, 1, 2, 3]

    return list(_images().values()), check


def annotations(folder: Path) -> tuple[list[bytes], Check]:
    """All validation labels of Tiny-ImageNet are right, or the list is refused."""
    root = write_tiny_imagenet(folder / "tiny")
    path = root / "val" / "val_annotations.txt"
    original = scan_tiny_imagenet(root).test

    def check(content: bytes, _: bytes) -> None:
        path.write_bytes(content)
        assert scan_tiny_imagenet(root).test == original

    return [path.read_bytes()], check


def caches(folder: Path) -> tuple[list[bytes], Check]:
    """The cached arrays are right, or the cache is refused. Any one of its files is damaged."""
    originals = {}
    for number, size in enumerate((2, 5)):
        root = write_folder(folder / str(number), {"a": (30, 2), "b": (9, 2)}, size=size)
        dataset = load_dataset("imagefolder-lt", root, report=_silent)
        arrays = {"train": dataset.train.images.copy(), "test": dataset.test.images.copy()}
        (cache,) = (card.parent for card in root.glob(f".ltat_fast_cache/*/{CARD}"))
        for path in sorted(cache.iterdir()):
            originals[path.read_bytes()] = path, arrays

    def check(content: bytes, original: bytes) -> None:
        path, arrays = originals[original]
        path.write_bytes(content)
        try:
            read = read_cache(path.parent, path.parent.name, tuple(arrays))
            if read is None:
                raise UserError("the cache is refused")
            assert read.bad == {}
            assert all(np.array_equal(read.images[k], arrays[k]) for k in arrays)
        finally:
            path.write_bytes(original)

    return list(originals), check


def checkpoints(folder: Path) -> tuple[list[bytes], Check]:
    """The tensors and the card of a checkpoint are right, or the file is refused."""
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
    """Without its checksum, a CIFAR batch gives valid arrays or is refused; no code in it is run."""
    rng = np.random.RandomState(0)
    rows = rng.randint(0, 256, (4, 3072)).astype(np.uint8)
    originals = [pickle.dumps({"data": rows, "labels": [0, 9, 5, 5]}, protocol) for protocol in (0, 2, 4)]
    path = Path("data_batch_1")

    def check(content: bytes, original: bytes) -> None:
        pixels, labels = load_batch(content, path, 10)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (len(labels), 3, 32, 32)
        assert all(0 <= label < 10 for label in labels)

    return originals, check


def svhn_files(folder: Path) -> tuple[list[bytes], Check]:
    """The arrays are right, or the file is refused. SciPy's reader crashes on damage, so the checksum comes first."""
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    path, originals = folder / "train_32x32.mat", []
    for compressed in (False, True):
        savemat(path, {"X": pixels, "y": np.array([[10], [1], [9], [5]])}, do_compression=compressed)
        originals.append(path.read_bytes())

    def check(content: bytes, original: bytes) -> None:
        path.write_bytes(content)
        images, labels = read_svhn(
            fetch(Archive(f"http://localhost/{path.name}", _md5(original)), folder, False, _silent)
        )
        assert np.array_equal(images, pixels.transpose(3, 2, 0, 1))
        assert labels.tolist() == [0, 1, 9, 5]

    return originals, check


def configurations(folder: Path) -> tuple[list[bytes], Check]:
    """A configuration that was read from RUN/config.json can be written and read again without a change."""
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
FLIPS_AND_CUTS_ONLY = {"png_files"}  # a splice from another PNG can be a valid PNG


def _images() -> dict[str, bytes]:
    """Return small image files, by name, of every format and pixel mode."""
    rng = np.random.RandomState(0)
    colour = Image.fromarray(rng.randint(0, 256, (9, 7, 3)).astype(np.uint8))
    deep = Image.fromarray(rng.randint(0, 65536, (9, 7)).astype(np.uint16))
    frames = {"save_all": True, "append_images": [colour.rotate(90, expand=False)]}
    kinds = [("a.png", colour, {}), ("a.jpg", colour, {}), ("a.gif", colour, frames), ("a.bmp", colour, {})]
    kinds += [("a.tif", colour, {}), ("lzw.tif", colour, {"compression": "tiff_lzw"}), ("a.webp", colour, frames)]
    kinds += [("a.ppm", colour, {}), ("deep.png", deep, {}), ("cmyk.jpg", colour.convert("CMYK"), {})]
    kinds += [("progressive.jpg", colour, {"progressive": True}), ("alpha.png", colour.convert("RGBA"), {})]
    kinds += [("palette.png", colour.convert("P"), {"transparency": 3}), ("still.webp", colour, {"lossless": True})]
    files = {}
    for name, image, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, Image.registered_extensions()["." + name.split(".")[1]], **options)
        files[name] = buffer.getvalue()
    return files


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _silent(line: str) -> None:
    pass


def fuzz(make: Callable, seed: int, seconds: float, iterations: int) -> dict:
    """Damage files until the time or the iterations are used up, or 5 findings are made; return counts and findings."""
    name, start = make.__name__, time.monotonic()
    result = {"target": name, "tried": 0, "accepted": 0, "refused": 0, "findings": []}
    with tempfile.TemporaryDirectory() as folder:
        originals, check = make(Path(folder))
        for original in originals:
            check(original, original)
        while result["tried"] < iterations and time.monotonic() - start < seconds and len(result["findings"]) < 5:
            rng = random.Random(f"{name}/{seed}/{result['tried']}")
            original = rng.choice(originals)
            if name in FLIPS_AND_CUTS_ONLY:
                damaged = bytearray(original)
                rng.choice((flip, cut))(damaged, rng)
                damaged = bytes(damaged)
            else:
                damaged = mutate(original, originals, rng)
            if damaged in originals:  # damage can undo itself, or turn one original into another
                original = damaged
            # Processor time, not the clock of a busy machine. There is no handler, so the signal ends this process.
            signal.setitimer(signal.ITIMER_PROF, HANG)
            try:
                check(damaged, original)
                result["accepted"] += 1
            except UserError:
                result["refused"] += 1
            except Exception:
                result["findings"].append({"file": base64.b85encode(damaged).decode(), "error": traceback.format_exc()})
            signal.setitimer(signal.ITIMER_PROF, 0)
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
