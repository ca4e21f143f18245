"""Learning rates against the literals of the published schedules (epochs from 1 there, from 0 in the code)."""

import itertools

import pytest

from ltat_fast.errors import UserError
from ltat_fast.schedule import first_drop, learning_rate, parse_schedule


def by_epoch(epochs: int, kind: str = "step") -> list[float]:
    """The rate of each epoch; a hundred steps an epoch, all at the same rate."""
    rates = [{learning_rate(kind, 0.1, e, s, epochs, 100) for s in (0, 50, 99)} for e in range(epochs)]
    assert all(len(rate) == 1 for rate in rates)
    return [rate.pop() for rate in rates]


def test_a_hundred_epochs_as_at_bsl():
    expected = [0.1] * 74 + [0.01] * 15 + [0.001] * 10 + [0.0001]  # from epochs 1, 75, 90 and 100 on
    assert by_epoch(100) == pytest.approx(expected, rel=1e-12)


def test_thirty_epochs_of_the_teacher():
    assert by_epoch(30) == pytest.approx([0.1] * 22 + [0.01] * 4 + [0.001] * 3 + [0.0001], rel=1e-12)


def test_the_igdm_papers():
    """The first epochs at a lower rate are 101 and 151 of 200, and for RSLAD 216, 261 and 286 of 300."""
    assert by_epoch(200, "igdm") == pytest.approx([0.1] * 100 + [0.01] * 50 + [0.001] * 50, rel=1e-12)
    expected = [0.1] * 215 + [0.01] * 45 + [0.001] * 25 + [0.0001] * 15
    assert by_epoch(300, "rslad") == pytest.approx(expected, rel=1e-12)


def test_shares_of_ones_own():
    """The Tiny-ImageNet runs of the IGDM paper drop after epochs 50 and 80 of 100."""
    assert by_epoch(100, "0.5,0.8") == pytest.approx([0.1] * 50 + [0.01] * 30 + [0.001] * 20, rel=1e-12)
    assert first_drop("0.8,0.5", 100) == 50


@pytest.mark.parametrize("kind", ["", "cosine", "0.5,", "0,0.5", "1.0", "nan", "50,80"])
def test_what_is_no_schedule(kind):
    with pytest.raises(UserError, match="--lr-schedule takes step, igdm, rslad, onecycle, or shares"):
        parse_schedule(kind)


@pytest.mark.parametrize("kind", ["step", "igdm", "rslad"])
def test_a_single_epoch_keeps_the_full_rate(kind):
    assert by_epoch(1, kind) == [0.1]


@pytest.mark.parametrize("kind", ["step", "igdm", "rslad"])
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 30, 76, 100, 200])
def test_first_drop_is_the_first_lowered_epoch(epochs, kind):
    lowered = [e for e, rate in enumerate(by_epoch(epochs, kind)) if rate < 0.1]
    assert first_drop(kind, epochs) == (lowered[0] if lowered else 0)


def test_onecycle():
    """10 epochs of 10 steps: up over 30 steps from a tenth, then down; the hundred-and-first step would be at zero."""
    rates = [learning_rate("onecycle", 0.2, e, s, 10, 10) for e in range(10) for s in range(10)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[15] == pytest.approx(0.2 * 0.55)
    assert rates[30] == max(rates) == pytest.approx(0.2)
    assert rates[65] == pytest.approx(0.1)
    assert rates[99] == pytest.approx(0.2 / 70)
    steps = [b - a for a, b in itertools.pairwise(rates)]
    assert steps == pytest.approx([0.18 / 30] * 30 + [-0.2 / 70] * 69)


@pytest.mark.parametrize(("epochs", "per_epoch"), [(1, 1), (1, 2), (2, 1), (1, 3)])
def test_onecycle_of_next_to_nothing_stays_positive(epochs, per_epoch):
    for e in range(epochs):
        for s in range(per_epoch):
            assert 0 < learning_rate("onecycle", 0.2, e, s, epochs, per_epoch) <= 0.2
