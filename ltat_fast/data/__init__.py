"""Datasets as uint8 arrays, the long-tailed profile, and batches made on the training device."""

from ltat_fast.data.host import HostImages
from ltat_fast.data.loader import DeviceLoader, resident
from ltat_fast.data.longtail import (
    LongTailed,
    balanced_indices,
    class_counts,
    class_groups,
    holdout_split,
    index_hash,
    long_tailed_indices,
    make_long_tailed,
)
from ltat_fast.data.sources import DATASETS, Dataset, ImageSet, load_dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "DeviceLoader",
    "HostImages",
    "ImageSet",
    "LongTailed",
    "balanced_indices",
    "class_counts",
    "class_groups",
    "holdout_split",
    "index_hash",
    "load_dataset",
    "long_tailed_indices",
    "make_long_tailed",
    "resident",
]
