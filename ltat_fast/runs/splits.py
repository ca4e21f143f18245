"""The images of a run, selected by its configuration: training, test and selection split, on the device."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ltat_fast import trust
from ltat_fast.config import Config
from ltat_fast.data import Dataset, HostImages, ImageSet, load_dataset, longtail, resident
from ltat_fast.data.digest import digest
from ltat_fast.data.space import choose_placement
from ltat_fast.errors import UserError
from ltat_fast.runs import log

IMAGES = {"heldout": "held-out", "val": "validation"}


@dataclass
class DeviceImages:
    """uint8 images ``(N, C, H, W)`` and int64 labels ``(N,)`` for a device.

    The labels are on this device. The images are too, or they stay on the host, and an index moves them to the device.
    """

    images: Tensor | HostImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass
class Splits:
    """The images of a run.

    select: images that select the best epoch. counts: training images per class, without held-out images. groups:
    classes by group, such as "tail". index_hash: hash of the selected training indices. pad: pixels of padding before
    a random crop. flip: whether images are flipped at random. selected_on: "test", "heldout" or "val", what ``select``
    holds. left_out: paths of the bad images that were left out. digests: checksums of what was read, by name.
    """

    train: DeviceImages
    test: DeviceImages
    select: DeviceImages
    counts: list[int]
    groups: dict[str, list[int]]
    class_names: tuple[str, ...]
    index_hash: str
    pad: int
    flip: bool
    selected_on: str = "test"
    left_out: tuple[str, ...] = ()
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def in_channels(self) -> int:
        return self.test.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the inputs of the network. Training images may be stored larger."""
        height, width = self.test.images.shape[-2:]
        return height, width


def load_splits(config: Config, device: torch.device) -> Splits:
    """Read the images, select the long tail, place the splits and print what they hold."""
    dataset = read_dataset(config)
    height, width = dataset.train.images.shape[2:]
    if config.crop == "resized" and height != width:
        raise UserError(f"--crop resized makes square images, and these have {width}x{height}: set --image-size")
    selected_on = _selected_on(config, dataset)
    tailed = longtail.make_long_tailed(dataset, config.imbalance_ratio)
    rows, labels, indices = tailed.rows, tailed.labels, tailed.indices
    test = host_images(dataset.test, device, config)
    select = test
    if selected_on == "val" and dataset.val is not None:
        select = host_images(dataset.val, device, config)
    elif selected_on == "heldout":
        kept, held = longtail.holdout_split(labels, np.arange(len(labels)), config.heldout)
        if len(held) == 0:
            raise UserError(f"--select-on heldout: {config.heldout:g} of each class holds out no image")
        select = host_images(dataset.train, device, config, rows[held])
        rows, labels, indices = rows[kept], labels[kept], indices[kept]
    train = DeviceImages(HostImages(dataset.train.images, rows, device=device), resident(labels, device))
    counts = np.bincount(labels, minlength=len(tailed.class_names)).tolist()
    index_hash = longtail.index_hash(indices)
    log.say(
        f"{config.dataset}: {len(labels):,} training images in {len(counts)} classes "
        f"({max(counts)} to {min(counts)} per class), index hash {index_hash}; {len(test):,} test images"
        + (f"; {len(select):,} {IMAGES[selected_on]} images for selection" if select is not test else "")
    )
    parts = [train, test] + ([select] if select is not test else [])
    placement, line = choose_placement(config.data_placement, sum(part.images.nbytes for part in parts), device)
    if placement == "device":
        for part in parts:
            part.images = part.images.to_device()
    log.say(line)
    return Splits(
        train,
        test,
        select,
        counts,
        tailed.groups,
        tailed.class_names,
        index_hash,
        0 if config.store_size else dataset.pad,
        dataset.flip,
        selected_on,
        dataset.left_out,
        _digests(dataset) | {"selection of training images": index_hash},
    )


def _digests(dataset: Dataset) -> dict[str, str]:
    """Return checksums of the images and labels of each split, and of the names of the classes."""
    parts = {"training": dataset.train, "test": dataset.test}
    if dataset.val is not None:
        parts["validation"] = dataset.val
    found = {"class names": digest(dataset.train.class_names)}
    for name, part in parts.items():
        found |= {f"{name} images": part.digest, f"{name} labels": digest(part.labels.tolist())}
    return found


def read_dataset(config: Config, download: bool = True) -> Dataset:
    """Read the dataset of a run, with images of ``--store-size``.

    Nothing is written to a folder of images that only the files of a run name.
    """
    return load_dataset(
        config.dataset,
        config.data_dir,
        image_size=config.store_size or config.image_size,
        bad_images=config.bad_images,
        download=download and trust.may_write(config.data_dir),
        keep=trust.may_write(config.data_dir),
        report=log.say,
        open_bar=log.progress,
    )


def host_images(part: ImageSet, device: torch.device, config: Config, rows: np.ndarray | None = None) -> DeviceImages:
    """Return images for evaluation: the centre of the stored ones. rows: int64, which of ``part``; all of them if None.

    The pixels stay on the host.
    """
    size = config.image_size if config.store_size else None
    labels = part.labels if rows is None else part.labels[rows]
    return DeviceImages(HostImages(part.images, rows, size, device), resident(labels, device))


def _selected_on(config: Config, dataset: Dataset) -> str:
    """Return the value of ``--select-on`` that "auto" stands for, and say it if the choice is not obvious."""
    if dataset.val is None:
        if config.select_on == "val":
            raise UserError(f"--select-on val: {config.dataset} has no validation split beside its test split here")
        return "test" if config.select_on == "auto" else config.select_on
    chosen = "val" if config.select_on == "auto" else config.select_on
    what = "selects the best epoch" if chosen == "val" else f"is not used, because of --select-on {chosen}"
    log.say(
        f"the validation split ({len(dataset.val.labels):,} images) {what}; the final evaluation uses the test split"
    )
    return chosen


def balanced_indices(config: Config, splits: Splits) -> np.ndarray:
    """Draw the teacher's balanced set: indices of gamma * (size of the smallest class) training images per class."""
    largest, smallest = max(splits.counts), min(splits.counts)
    gamma = config.gamma or max(1.0, largest / smallest / 2)
    per_class = max(1, round(gamma * smallest))
    log.say(f"teacher's balanced set: {per_class} images per class, {per_class * splits.num_classes:,} in all")
    return longtail.balanced_indices(splits.train.labels.cpu().numpy(), per_class)


def counts_tensor(splits: Splits, device: torch.device) -> Tensor:
    """Return the training images per class as int64 ``(num_classes,)``."""
    return torch.tensor(splits.counts, dtype=torch.int64, device=device)
