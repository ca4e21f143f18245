"""The datasets by name, each as two plain uint8 arrays: train and test."""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np

from ltat_fast.data.cache import prepare, user_cache
from ltat_fast.data.cifar import read_cifar
from ltat_fast.data.decode import MAX_PIXELS
from ltat_fast.data.download import Archive, fetch, unpack
from ltat_fast.data.folder import Tree, scan_image_folder, scan_tiny_imagenet
from ltat_fast.data.svhn import read_svhn
from ltat_fast.errors import UserError

DEFAULT_DATA_DIR = Path("data")
TINY_IMAGENET = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")


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
        data_dir: where its files lie or are downloaded to; None is :data:`DEFAULT_DATA_DIR`. Unused by digits-lt,
            required by imagefolder-lt.
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
    return _checked(DATASETS[name](Request(name, data_dir, image_size, download, cache_dir, report)))


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


def _tiny_imagenet(request: Request) -> Dataset:
    """Tiny-ImageNet from its official tree, unpacked or downloaded when ``data_dir`` holds only the zip or nothing."""
    data_dir = request.data_dir or DEFAULT_DATA_DIR
    root = data_dir / "tiny-imagenet-200"
    if not root.is_dir() and (data_dir / "val" / "val_annotations.txt").exists():
        root = data_dir
    if not root.is_dir():
        archive = fetch(TINY_IMAGENET, data_dir, request.download, request.report)
        root = unpack(archive, data_dir, root.name, request.report)
    return _decoded(request, scan_tiny_imagenet(root, request.report), n_max=500)


def _image_folder(request: Request) -> Dataset:
    if request.data_dir is None:
        raise UserError("imagefolder-lt needs --data-dir, a folder with train/<class>/* and test/<class>/*")
    return _decoded(request, scan_image_folder(request.data_dir, request.report), n_max=None)


def _decoded(request: Request, tree: Tree, n_max: int | None) -> Dataset:
    if request.image_size is not None and not 1 <= request.image_size <= isqrt(MAX_PIXELS):
        raise UserError(f"the image size must be between 1 and {isqrt(MAX_PIXELS):,} pixels, got {request.image_size}")
    beside = (request.data_dir or DEFAULT_DATA_DIR) / ".ltat_fast_cache"
    arrays = prepare(tree, request.image_size, [request.cache_dir or beside, user_cache()], request.report)
    train, test = (
        ImageSet(arrays[f"{split}.images"], arrays[f"{split}.labels"], tree.class_names) for split in ("train", "test")
    )
    return Dataset(request.name, train, test, n_max, pad=4, flip=True)


def _cifar10(request: Request) -> Dataset:
    from ltat_fast._torchvision import torchvision

    return _cifar(request, torchvision.datasets.CIFAR10, n_max=5000)


def _cifar100(request: Request) -> Dataset:
    from ltat_fast._torchvision import torchvision

    return _cifar(request, torchvision.datasets.CIFAR100, n_max=500)


def _cifar(request: Request, published: type, n_max: int) -> Dataset:
    _refuse_resize(request, 32)
    root = request.data_dir or DEFAULT_DATA_DIR
    archive = Archive(published.url, published.tgz_md5)
    train, test, names = read_cifar(published, root, lambda: fetch(archive, root, request.download, request.report))
    return Dataset(request.name, ImageSet(*train, names), ImageSet(*test, names), n_max, pad=4, flip=True)


def _svhn(request: Request) -> Dataset:
    """Street numbers, without the extra images. A mirrored digit is another digit or none, so no flip."""
    from ltat_fast._torchvision import torchvision

    _refuse_resize(request, 32)
    root = request.data_dir or DEFAULT_DATA_DIR
    names = tuple(map(str, range(10)))

    def image_set(split: str) -> ImageSet:
        url, _, md5 = torchvision.datasets.SVHN.split_list[split]
        return ImageSet(*read_svhn(fetch(Archive(url, md5), root, request.download, request.report)), names)

    return Dataset(request.name, image_set("train"), image_set("test"), n_max=None, pad=4, flip=False)


def _checked(dataset: Dataset) -> Dataset:
    """``dataset``, if each of its images has a label, each label is a class, and each class has an image."""
    for split in ("train", "test"):
        part: ImageSet = getattr(dataset, split)
        if len(part.images) != len(part.labels):
            raise UserError(f"{dataset.name}: {len(part.images):,} {split} images have {len(part.labels):,} labels")
        if len(part.labels) and not 0 <= part.labels.min() <= part.labels.max() < len(part.class_names):
            raise UserError(f"{dataset.name}: a {split} label is none of its {len(part.class_names)} classes")
        counts = np.bincount(part.labels, minlength=len(part.class_names))
        if not counts.all():
            raise UserError(f"{dataset.name}: class {part.class_names[counts.argmin()]!r} has no {split} image")
    return dataset


def _refuse_resize(request: Request, native: int) -> None:
    if request.image_size not in (None, native):
        raise UserError(f"{request.name} has {native}x{native} images; --image-size is for folders of images")


DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "digits-lt": _digits,
    "cifar10-lt": _cifar10,
    "cifar100-lt": _cifar100,
    "svhn-lt": _svhn,
    "tinyimagenet-lt": _tiny_imagenet,
    "imagefolder-lt": _image_folder,
}
