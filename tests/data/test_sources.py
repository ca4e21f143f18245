"""Checks that apply to every dataset, whatever its source."""

import dataclasses

import numpy as np
import pytest

from ltat_fast.data import load_dataset, sources
from ltat_fast.data.sources import Dataset, ImageSet
from ltat_fast.errors import UserError

IMAGES = np.zeros((4, 1, 2, 2), np.uint8)
VALID = ImageSet(IMAGES, np.array([0, 1, 1, 2]), ("a", "b", "c"))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 2])}, "4 {} images have 3 labels"),
        ({"labels": np.array([0, 1, 2, 3])}, r"the {} label 3 is not in 0\.\.2"),
        ({"labels": np.array([0, 1, 2, -1])}, r"the {} label -1 is not in 0\.\.2"),
        ({"labels": np.array([0, 2, 2, 2])}, "class 'b' has no {} image"),
        ({"images": IMAGES[:0], "labels": np.array([], np.int64)}, "class 'a' has no {} image"),
    ],
)
def test_inconsistent_labels_are_refused(monkeypatch, split, change, message):
    broken = {"train": VALID, "test": VALID, split: dataclasses.replace(VALID, **change)}
    dataset = Dataset("made-lt", **broken, n_max=None, pad=0, flip=False)
    monkeypatch.setitem(sources.DATASETS, "made-lt", lambda request: dataset)
    with pytest.raises(UserError, match=f"^made-lt: {message.format(split)}"):
        load_dataset("made-lt")
