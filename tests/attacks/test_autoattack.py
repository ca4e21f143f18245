"""The AutoAttack adapter against the package called directly, and on few classes."""

import logging

import pyautoattack
import pytest
import torch
from quick_autoattack import QuickAutoAttack
from toys import Linear, images

from ltat_fast.attacks.autoattack import autoattack

EPS = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)


def case(num_classes: int, n: int = 24):
    net, x = Linear(torch.randn(num_classes, 108, generator=torch.Generator().manual_seed(1))), images(n)
    return net, x, net(x).argmax(1)


def test_equals_the_package_called_directly():
    net, x, y = case(10)
    direct = QuickAutoAttack(net, device="cpu", eps=EPS, norm="Linf", seed=0, version="standard")
    expected, _ = direct.run_standard_evaluation(x, y, batch_size=10)
    ours = autoattack(net, x, y, EPS, batch_size=10)
    assert torch.equal(ours, expected)
    assert 0 < (net(ours).argmax(1) != y).sum() < len(y)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_works_with_few_classes(num_classes, caplog):
    net, x, y = case(num_classes)
    rng = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        x_adv = autoattack(net, x, y, EPS, batch_size=10)
    assert "classes" not in caplog.text
    assert torch.equal(torch.get_rng_state(), rng)
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    broken = net(x_adv).argmax(1) != y
    assert 0 < broken.sum() < len(y)
    assert torch.equal(x_adv[~broken], x[~broken])


def test_the_fewer_classes_the_fewer_targets(monkeypatch):
    seen = {}

    def record(self, x, y, *, batch_size):
        seen.update(
            attacks=self.attacks_to_run, targets=(self.apgd_targeted.n_target_classes, self.fab.n_target_classes)
        )
        return x, y

    monkeypatch.setattr(QuickAutoAttack, "run_standard_evaluation", record)
    for num_classes, targets, attacks in (
        (12, (9, 9), ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (5, (4, 4), ["apgd-ce", "apgd-t", "fab-t", "square"]),
        (3, (2, 2), ["apgd-ce", "fab-t", "square"]),
    ):
        net, x, y = case(num_classes, 2)
        autoattack(net, x, y, EPS)
        assert seen == {"attacks": attacks, "targets": targets}
