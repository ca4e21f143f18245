"""The datasets by name, each as two plain uint8 arrays: train and test."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ltat_fast.errors import UserError


@dataclass(frozen=True)
class ImageSet:
    images: np.ndarray
    """uint8 (N, C, H, W); may be a read-only memory map"""
    labels: np.ndarray
    """int64 (N,), each class of ``class_names`` present"""
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class Dataset:
    name: str
    train: ImageSet
    test: ImageSet
    n_max: int | None
    """images of one class in the balanced original, where the long tail starts; None: the largest class found"""
    pad: int
    """zeros around an image that a random crop may reach into"""
    flip: bool
    """whether a mirrored image still shows its class"""


@dataclass(frozen=True)
class Request:
    """What :func:`load_dataset` was asked for."""

    name: str
    data_dir: Path | None
    image_size: int | None
    download: bool
    cache_dir: Path | None
    report: Callable[[str], None]


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    download: bool = True,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = print,
) -> Dataset:
    """Load the dataset called ``name``, one of :data:`DATASETS`.

    Args:
        data_dir: where its files lie or are downloaded to; None is ``data/`` in the current directory. Unused by
            digits-lt, required by imagefolder-lt.
        image_size: resize to this many pixels a side (tinyimagenet-lt and imagefolder-lt only)
        download: fetch what is missing
        cache_dir: where decoded images are kept; None is beside the data, or the user's cache directory when the data
            cannot be written to
        report: called with each line worth telling the user

    Raises:
        UserError: an unknown name, or data that is missing, damaged or not what its name says.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    return DATASETS[name](Request(name, data_dir, image_size, download, cache_dir, report))


def _digits(request: Request) -> Dataset:
    """scikit-learn's 1797 handwritten digits, 8x8 grey. 60 of each class, drawn once and for all, are the test set.

    What remains of the smallest class, 114 images, starts the long tail: every class can then give its full count.
    """
    from sklearn.datasets import load_digits

    _refuse_resize(request, 8)
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    rng = np.random.RandomState(0)
    by_class = [rng.permutation(np.flatnonzero(labels == c)) for c in range(10)]
    test = np.sort(np.concatenate([members[:60] for members in by_class]))
    train = np.sort(np.concatenate([members[60:] for members in by_class]))
    names = tuple(map(str, range(10)))
    return Dataset(
        request.name,
        ImageSet(images[train], labels[train], names),
        ImageSet(images[test], labels[test], names),
        n_max=min(len(members) - 60 for members in by_class),
        pad=1,
        flip=False,
    )


def _refuse_resize(request: Request, native: int) -> None:
    if request.image_size not in (None, native):
        raise UserError(f"{request.name} has {native}x{native} images; --image-size is for folders of images")


DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "digits-lt": _digits,
}
