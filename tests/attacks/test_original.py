"""The AutoAttack adapter against a direct call of the package, and with few classes."""

import logging

import numpy as np
import pyautoattack
import pytest
import torch

from helpers.quick_autoattack import QuickAutoAttack
from helpers.toy_networks import Linear, images
from ltat_fast.attacks.original import original_autoattack
from ltat_fast.training.evaluation import evaluate

EPS = 0.02


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)


def case(num_classes: int, n: int = 24):
    net, x = Linear(torch.randn(num_classes, 108, generator=torch.Generator().manual_seed(1))), images(n)
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_the_adapter_equals_a_direct_call_of_the_package(version):
    net, x, y = case(10)
    direct = QuickAutoAttack(net, device="cpu", eps=EPS, norm="Linf", seed=0, version=version)
    expected, _ = direct.run_standard_evaluation(x, y, batch_size=10)
    ours = original_autoattack(net, x, y, EPS, batch_size=10, version=version)
    assert torch.equal(ours, expected)
    assert 0 < (net(ours).argmax(1) != y).sum() < len(y)


@pytest.mark.parametrize(("name", "version"), [("original", "standard"), ("plus", "plus"), ("rand", "rand")])
def test_the_accuracies_are_those_of_the_package(name, version, monkeypatch):
    """Over all images, per group and per class, recomputed with NumPy from the adversarial examples of the package."""
    seen = []

    class Recording(QuickAutoAttack):
        def _set_version(self, version="standard"):
            seen.append(version)
            super()._set_version(version)

    monkeypatch.setattr(pyautoattack, "AutoAttack", Recording)
    net, x, y = case(10, n=60)
    pixels = (x * 255).to(torch.uint8)
    direct = QuickAutoAttack(net, device="cpu", eps=EPS, norm="Linf", seed=0, version=version)
    x_adv, _ = direct.run_standard_evaluation(pixels / 255, y, batch_size=25)
    right, classes = (net(x_adv).argmax(1) == y).numpy(), y.numpy()
    groups = {"head": [0, 1, 2], "tail": [8, 9]}
    ours = evaluate(net, pixels, y, [f"autoattack-{name}"], groups, 10, EPS, batch_size=25)[f"autoattack-{name}"]
    assert seen == [version]  # all versions break the same images of such a small model
    assert 0 < ours.all < 100
    assert ours.all == pytest.approx(100 * right.mean())
    for group, members in groups.items():
        assert ours.percent(group) == pytest.approx(100 * right[np.isin(classes, members)].mean()), group
    for c, accuracy in enumerate(ours.per_class):
        mine = right[classes == c]
        assert accuracy == (pytest.approx(100 * mine.mean()) if len(mine) else None), c


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_the_adapter_works_with_few_classes(num_classes, caplog):
    net, x, y = case(num_classes)
    rng = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        x_adv = original_autoattack(net, x, y, EPS, batch_size=10)
    assert "classes" not in caplog.text
    assert torch.equal(torch.get_rng_state(), rng)
    assert (x_adv - x).abs().max() <= EPS + 1e-6
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    broken = net(x_adv).argmax(1) != y
    assert 0 < broken.sum() < len(y)
    assert torch.equal(x_adv[~broken], x[~broken])


def test_few_classes_reduce_the_targets_and_the_attacks(monkeypatch):
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
        original_autoattack(net, x, y, EPS)
        assert seen == {"attacks": attacks, "targets": targets}
    for num_classes, attacks in ((3, ["apgd-ce", "apgd-dlr"]), (2, ["apgd-ce"])):
        net, x, y = case(num_classes, 2)
        original_autoattack(net, x, y, EPS, version="rand")
        assert seen["attacks"] == attacks
