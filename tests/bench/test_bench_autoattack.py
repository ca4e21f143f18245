"""bench/autoattack.py on a toy network and with few steps: it compares verdicts and refuses wrong examples."""

import pyautoattack
import pytest
import torch

from bench import autoattack as bench
from helpers.quick_autoattack import QuickAutoAttack, quick_searches
from helpers.toy_networks import Linear, images
from ltat_fast.attacks import autoattack as module

EPS = 0.02


def case():
    net, x = Linear(torch.randn(10, 108, generator=torch.Generator().manual_seed(1))), images(40)
    return net, x, net(x).argmax(1)


def test_the_table_counts_the_verdicts_of_both(monkeypatch, capsys):
    monkeypatch.setattr(module, "searches", quick_searches)
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)
    net, x, y = case()
    columns = {"package": bench.package(net, EPS, x.device), "ours": bench.own(net, EPS)}
    columns["nothing"] = lambda x, y: (x.clone(), {"apgd-ce": 1.0})
    package, ours, nothing = bench.interleaved(net, columns, x, y, EPS, group=25)
    assert 0 < package["robust"] < 40
    assert abs(ours["robust"] - package["robust"]) <= 1
    assert (nothing["robust"], nothing["differ"], nothing["seconds"]) == (40, 40 - package["robust"], 2.0)
    assert min(package[part] for part in module.PARTS[:2]) > 0
    assert ours["seconds"] > 0
    assert "40 images, 40 classified correctly, eps 0.02" in capsys.readouterr().out


@pytest.mark.parametrize("outside", [lambda x: x + 2 * EPS, lambda x: x - 1])
def test_an_example_outside_the_ball_is_refused(outside):
    net, x, y = case()
    with pytest.raises(ValueError, match="an adversarial example is outside the ball"):
        bench.interleaved(net, {"wrong": lambda x, y: (outside(x), {})}, x, y, EPS, group=40)
