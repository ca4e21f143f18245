"""Ten groups of classes by frequency, compared with the accuracy computed from single images."""

from itertools import pairwise

import numpy as np
import pytest

from ltat_fast.analysis.classwise import classwise, frequency_groups


def test_a_hundred_classes_in_ten_groups_by_frequency():
    counts = np.random.RandomState(0).permutation(100) + 5
    groups = frequency_groups(counts.tolist())
    assert [len(group) for group in groups] == [10] * 10
    assert sorted(c for group in groups for c in group) == list(range(100))
    for group, following in pairwise(groups):
        assert min(counts[group]) > max(counts[following])


def test_fewer_classes_than_groups_and_uneven_ones():
    assert frequency_groups([3, 9, 5]) == [[1], [2], [0]]
    assert [len(group) for group in frequency_groups(range(25))] == [3] * 5 + [2] * 5
    assert frequency_groups([7, 7, 7]) == [[0], [1], [2]]


def test_against_the_images():
    rng = np.random.RandomState(1)
    labels = rng.choice(30, 2000, p=rng.dirichlet(np.ones(30)))
    correct = rng.rand(2000) < 0.3 + labels / 60
    counts = rng.permutation(30) * 10 + 3
    images = np.bincount(labels, minlength=30)
    per_class = [100 * correct[labels == c].mean() if images[c] else None for c in range(30)]
    expected = [100 * correct[np.isin(labels, group)].mean() for group in frequency_groups(counts)]
    assert classwise(per_class, images, counts) == pytest.approx(expected)


def test_a_group_without_images():
    assert classwise([50.0, None], [4, 0], [9, 5]) == [50.0, None]
