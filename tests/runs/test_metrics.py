"""Which images a limit picks, and the worst case over attacks."""

import dataclasses

import numpy as np
import pytest
import torch

from ltat_fast.attacks.results import Result
from ltat_fast.runs.metrics import spread, worst_case

GROUPS = {"head": [0, 1], "medium": [2], "tail": [3], "nobody": [4]}


def test_a_limit_is_spread_over_the_classes():
    y = np.random.RandomState(0).permutation(np.repeat(np.arange(10), 100))
    chosen = spread(y, 50)
    assert np.bincount(y[chosen], minlength=10).tolist() == [5] * 10
    assert (np.diff(chosen) > 0).all()  # distinct, in the order of the set
    assert np.array_equal(chosen, spread(y, 50))


@pytest.mark.parametrize("limit", [None, 7, 8, 1000])
def test_without_a_limit_all_images_stay_in_order(limit):
    y = np.array([2, 0, 1, 0, 2, 1, 0])
    assert np.array_equal(spread(y, limit), np.arange(7))


@pytest.mark.parametrize("limit", [1, 2, 3, 6])
def test_a_limit_is_met_exactly(limit):
    assert len(set(spread(np.array([2, 0, 1, 0, 2, 1, 0]), limit).tolist())) == limit


def test_the_worst_of_one_attack_is_that_attack():
    y = torch.arange(20) % 3
    one = Result.from_correct(torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.5, y, GROUPS, 5)
    worst = worst_case({"pgd20": one}, y, GROUPS, 5)
    assert worst == dataclasses.replace(one, correct=None, attacks=("pgd20",))
