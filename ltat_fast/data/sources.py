"""The datasets by name, each with its training and test images as uint8 arrays."""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np

from ltat_fast.data.cache import OpenBar, Source, load_or_decode, user_cache_folder
from ltat_fast.data.cifar import read_cifar
from ltat_fast.data.decode import MAX_PIXELS, some_of
from ltat_fast.data.digest import crc32_of_chunks, images_digest
from ltat_fast.data.download import Archive, fetch, unpack
from ltat_fast.data.folder import Tree, scan_image_folder, scan_tiny_imagenet
from ltat_fast.data.imagelist import scan_image_lists
from ltat_fast.data.partial import good_rows
from ltat_fast.data.svhn import read_svhn
from ltat_fast.errors import UserError

DEFAULT_DATA_DIR = Path("data")
# SHA-256 and size of the published files, by the MD5 that torchvision or the authors publish.
SHA256_AND_SIZE = {
    "c58f30108f718f92721af3b95e74349a": (
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        170_498_071,
    ),
    "eb9058c3a382ffc7106e4002c42a8d85": (
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        169_001_437,
    ),
    "e26dedcc434d2e4c54c9b2d4a06d8373": (
        "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        182_040_794,
    ),
    "eb5a983be6a315427106f1b164d9cef3": (
        "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
        64_275_384,
    ),
    "90528d7ca1a48142e341f4ef8d21d0de": (
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        248_100_043,
    ),
}


def published_archive(url: str, md5: str) -> Archive:
    """Return the archive with all its known checksums."""
    return Archive(url, md5, *SHA256_AND_SIZE.get(md5, (None, None)))


TINY_IMAGENET = published_archive(
    "https://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
)
IMAGENET_LT = 1000, 115_846
"""classes and training images of ImageNet-LT (Liu et al. 2019)"""


@dataclass(frozen=True)
class ImageSet:
    """The images of one split."""

    images: np.ndarray
    """uint8 (N, C, H, W); may be a read-only memory map"""
    labels: np.ndarray
    """int64 (N,), positions in ``class_names``; every class is present, except in a validation split"""
    class_names: tuple[str, ...]
    positions: np.ndarray | None = None
    """int64 (N,), ascending: the place of each image in the files as found; None if no bad image was left out"""
    known_digest: str | None = None
    """``digest`` if the cache knows it"""

    @functools.cached_property
    def digest(self) -> str:
        """:func:`ltat_fast.data.digest.images_digest` of the images."""
        return self.known_digest or images_digest(self.images.shape, crc32_of_chunks(np.ascontiguousarray(self.images)))


@dataclass(frozen=True)
class Dataset:
    """A dataset before it is cut to the long tail."""

    name: str
    train: ImageSet
    test: ImageSet
    n_max: int | None
    """images per class in the balanced original, which is the size of class 0 in the long-tailed profile; None if no
    size is published (see :func:`ltat_fast.data.longtail.fitted_counts`)"""
    pad: int
    """zeros per side of an image before a random crop"""
    flip: bool
    """whether a horizontally flipped image still shows its class"""
    val: ImageSet | None = None
    """images that select the best epoch, if the dataset has them beside its test images"""
    left_out: tuple[str, ...] = ()
    """paths of the bad images that were left out"""


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`load_dataset`."""

    name: str
    data_dir: Path | None
    image_size: int | None
    download: bool
    keep: bool
    bad_images: str
    report: Callable[[str], None]
    open_bar: OpenBar


def load_dataset(
    name: str,
    data_dir: Path | None = None,
    *,
    image_size: int | None = None,
    download: bool = True,
    keep: bool = True,
    bad_images: str = "stop",
    report: Callable[[str], None] = print,
    open_bar: OpenBar | None = None,
) -> Dataset:
    """Load the dataset called ``name``, one of :data:`DATASETS`.

    Args:
        data_dir: the folder that holds the files of the dataset, or to which they are downloaded; None is
            :data:`DEFAULT_DATA_DIR`. digits-lt does not use it, image folders and lists require it. Decoded images are
            cached in ``data_dir/.ltat_fast_cache``, or in the user's cache folder if ``data_dir`` is not writable or
            its disk is too small.
        image_size: resize the images to this many pixels per side (datasets of image files only)
        download: download missing files
        keep: unpack archives and cache decoded images in ``data_dir``; if not, the cache is in the user's folder only
        bad_images: what to do with image files that cannot be read or decoded; "stop": raise an error that names them;
            "skip": leave them out and report which
        report: called with each line for the user
        open_bar: takes what is counted and how many there are, and returns a context manager with a progress bar for
            long work; None shows none

    Raises:
        UserError: an unknown name, or missing, damaged or inconsistent data.
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name!r}; choose from {', '.join(DATASETS)}")
    dataset = DATASETS[name](
        Request(name, data_dir, image_size, download, keep, bad_images, report, open_bar or _NoBar)
    )
    _check(dataset)
    return dataset


def _digits(request: Request) -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8x8 grey. The test set is a fixed draw of 60 images per class.

    ``n_max`` is the 114 images that remain of the smallest class, so that every class can fill its count.
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
    """Load Tiny-ImageNet from its official tree; unpack the zip file, or download it first, if the tree is missing."""
    data_dir = request.data_dir or DEFAULT_DATA_DIR
    root = data_dir / "tiny-imagenet-200"
    if not root.is_dir() and (data_dir / "val" / "val_annotations.txt").exists():
        root = data_dir
    if not root.is_dir():
        archive = fetch(TINY_IMAGENET, data_dir, request.download, request.report)
        if not request.keep:
            raise UserError(f"{root} is missing; name the folder with --data-dir to unpack {archive} there")
        root = unpack(archive, data_dir, root.name, request.report)
    return _load_tree(request, scan_tiny_imagenet(root, request.report), n_max=500)


def _image_folder(request: Request) -> Dataset:
    """Load any tree of ``train/<class>/*`` and ``test/<class>/*``."""
    if request.data_dir is None:
        raise UserError("imagefolder-lt needs --data-dir, a folder with train/<class>/* and test/<class>/*")
    return _load_tree(request, scan_image_folder(request.data_dir, request.report), n_max=None)


def _image_lists(request: Request) -> Dataset:
    """Load the images of ``train.txt``, ``val.txt`` and ``test.txt``."""
    return _load_tree(request, _scan_lists(request), n_max=None)


def _scan_lists(request: Request) -> Tree:
    if request.data_dir is None:
        raise UserError(f"{request.name} needs --data-dir, a folder with train.txt, and val.txt or test.txt")
    return scan_image_lists(request.data_dir, request.report)


def _parquet(request: Request) -> Dataset:
    """Load the images in Parquet files, as the Hugging Face hub stores them."""
    if request.data_dir is None:
        raise UserError("parquet-lt needs --data-dir, a folder with data/train-*.parquet and data/test-*.parquet")
    from ltat_fast.data.parquet import scan_parquet

    return _load_tree(request, scan_parquet(request.data_dir, request.report), n_max=None)


def _imagenet(request: Request) -> Dataset:
    """Load ImageNet-LT from its lists (Liu et al. 2019). Lists of another size are used, and said."""
    tree = _scan_lists(request)
    found = len(tree.class_names), len(tree.train.labels)
    if found != IMAGENET_LT:
        request.report(
            f"imagenet-lt: the lists have {found[0]:,} classes and {found[1]:,} training images; "
            f"ImageNet-LT has {IMAGENET_LT[0]:,} and {IMAGENET_LT[1]:,}"
        )
    return _load_tree(request, tree, n_max=None)


def _load_tree(request: Request, tree: Tree, n_max: int | None) -> Dataset:
    """Load the images of ``tree``, from the cache if it has them."""
    if request.image_size is not None and not 1 <= request.image_size <= isqrt(MAX_PIXELS):
        raise UserError(f"the image size must be between 1 and {isqrt(MAX_PIXELS):,} pixels, got {request.image_size}")
    cache_folders = [(request.data_dir or DEFAULT_DATA_DIR) / ".ltat_fast_cache", user_cache_folder()]
    source = Source(tree, request.image_size, request.report, request.open_bar)
    writable = cache_folders if request.keep else cache_folders[1:]
    decoded = load_or_decode(source, cache_folders, request.bad_images == "skip", writable)
    left_out = [os.path.relpath(source.paths[i], tree.root) for i in sorted(decoded.bad)]
    if left_out:
        listed = some_of([path.encode(errors="backslashreplace").decode() for path in left_out])
        request.report(f"left out {len(left_out):,} bad images: {listed}")
    good = good_rows(source.counts, decoded.bad)

    def image_set(split: str) -> ImageSet:
        labels = np.array(tree.splits[split].labels, np.int64)[good[split]]
        positions = good[split] if left_out else None
        return ImageSet(decoded.images[split], labels, tree.class_names, positions, decoded.digests[split])

    val = image_set("val") if tree.val is not None else None
    train, test = image_set("train"), image_set("test")
    return Dataset(request.name, train, test, n_max, pad=4, flip=True, val=val, left_out=tuple(left_out))


class _NoBar(contextlib.nullcontext):
    """A progress bar that is not shown."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(self)

    def advance(self, images: int, /) -> None:
        pass


def _cifar10(request: Request) -> Dataset:
    from ltat_fast._torchvision import torchvision

    return _cifar(request, torchvision.datasets.CIFAR10, n_max=5000)


def _cifar100(request: Request) -> Dataset:
    from ltat_fast._torchvision import torchvision

    return _cifar(request, torchvision.datasets.CIFAR100, n_max=500)


def _cifar(request: Request, published: type, n_max: int) -> Dataset:
    """Load CIFAR-10 or CIFAR-100; ``published`` is torchvision's class, for addresses and checksums."""
    _refuse_resize(request, 32)
    root = request.data_dir or DEFAULT_DATA_DIR
    archive = published_archive(published.url, published.tgz_md5)
    train, test, names = read_cifar(published, root, lambda: fetch(archive, root, request.download, request.report))
    return Dataset(request.name, ImageSet(*train, names), ImageSet(*test, names), n_max, pad=4, flip=True)


def _svhn(request: Request) -> Dataset:
    """Load SVHN's cropped digits without the "extra" split. No flip: a flipped digit is another digit or none."""
    from ltat_fast._torchvision import torchvision

    _refuse_resize(request, 32)
    root = request.data_dir or DEFAULT_DATA_DIR
    names = tuple(map(str, range(10)))

    def image_set(split: str) -> ImageSet:
        url, _, md5 = torchvision.datasets.SVHN.split_list[split]
        return ImageSet(*read_svhn(fetch(published_archive(url, md5), root, request.download, request.report)), names)

    return Dataset(request.name, image_set("train"), image_set("test"), n_max=None, pad=4, flip=False)


def _check(dataset: Dataset) -> None:
    """Raise UserError unless each image has a label, each label is a class, and each class has an image.

    A validation split may lack classes, but it is not empty.
    """
    for split, part in (("train", dataset.train), ("test", dataset.test), ("validation", dataset.val)):
        if part is None:
            continue
        if len(part.images) != len(part.labels):
            raise UserError(f"{dataset.name}: {len(part.images):,} {split} images have {len(part.labels):,} labels")
        outside = part.labels[(part.labels < 0) | (part.labels >= len(part.class_names))]
        if len(outside):
            raise UserError(f"{dataset.name}: the {split} label {outside[0]} is not in 0..{len(part.class_names) - 1}")
        counts = np.bincount(part.labels, minlength=len(part.class_names))
        if split == "validation":
            if not counts.any():
                raise UserError(f"{dataset.name}: the validation split has no image that can be used")
        elif not counts.all():
            raise UserError(f"{dataset.name}: class {part.class_names[counts.argmin()]!r} has no {split} image")


def _refuse_resize(request: Request, native: int) -> None:
    if request.image_size not in (None, native):
        raise UserError(
            f"{request.name} has {native}x{native} images and cannot be resized; remove --image-size "
            "(only datasets of image files take it)"
        )


DATASETS: dict[str, Callable[[Request], Dataset]] = {
    "digits-lt": _digits,
    "cifar10-lt": _cifar10,
    "cifar100-lt": _cifar100,
    "svhn-lt": _svhn,
    "tinyimagenet-lt": _tiny_imagenet,
    "imagefolder-lt": _image_folder,
    "imagelist-lt": _image_lists,
    "imagenet-lt": _imagenet,
    "parquet-lt": _parquet,
}
