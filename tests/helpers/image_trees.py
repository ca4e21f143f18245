"""Small image trees for the tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, value: int, size: int = 4, grey: bool = False) -> None:
    """Write an image with ``value`` in all of its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size) if grey else (size, size, 3)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path, format="PNG")


def write_folder(root: Path, counts: dict[str, tuple[int, int]], size: int = 4, test: str = "test") -> Path:
    """Write an image folder. ``counts``: (training, test) images per class. Pixel values number the files."""
    for split, which in (("train", 0), (test, 1)):
        value = 0
        for name, count in counts.items():
            for i in range(count[which]):
                write_image(root / split / name / f"{i}.png", value, size)
                value += 1
    return root


def write_image_lists(
    root: Path, counts: Sequence[int], sizes: Sequence[tuple[int, int]], test: int = 1, val: int | None = 1
) -> Path:
    """Write JPEG files of many sizes and their lists, in the manner of ImageNet-LT.

    The brightness of an image is that of its class, with noise on top. The lists are not sorted by label.

    Args:
        counts: training images per class
        sizes: widths and heights, used in turn
        test, val: images per class of the other splits; None writes no list of validation images
    """
    rng = np.random.RandomState(0)
    for split, of_class in (("train", counts), ("test", [test] * len(counts)), ("val", [val] * len(counts))):
        if of_class[0] is None:
            continue
        lines = []
        for label, count in enumerate(of_class):
            folder = root / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                width, height = sizes[(label + i) % len(sizes)]
                brightness = 20 + 215 * label / len(counts)
                pixels = np.clip(rng.normal(brightness, 10, (height, width, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.JPEG")
                lines.append(f"{split}/class {label}/{i}.JPEG {label}\n")
        rng.shuffle(lines)
        (root / f"{split}.txt").write_text("".join(lines))
    return root


def write_tiny_imagenet(root: Path, train_images: int = 1) -> Path:
    """Write the official tree: 200 classes, one validation image per class in random order, pixels of value label."""
    wnids = [f"n{10007 * (k + 1):08d}" for k in range(200)]
    for label, wnid in enumerate(wnids):
        for i in range(train_images):
            write_image(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", label, 8, grey=label % 7 == 0)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 1 1\n")
    lines = []
    for i, label in enumerate(np.random.RandomState(1).permutation(200)):
        write_image(root / "val" / "images" / f"val_{i}.JPEG", label, 8)
        lines.append(f"val_{i}.JPEG\t{wnids[label]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(reversed(wnids)))
    (root / "words.txt").write_text("n00010007\tthing\n")
    return root
