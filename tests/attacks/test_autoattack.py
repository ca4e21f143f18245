"""Our AutoAttack: against the package of its authors, and that batches, interruptions and precision change nothing."""

import contextlib
import functools

import pyautoattack
import pytest
import torch

from helpers.quick_autoattack import QUERIES, STEPS, QuickAutoAttack, quick_searches
from helpers.toy_networks import Linear, images, small_net
from ltat_fast.attacks import autoattack as module
from ltat_fast.attacks.autoattack import PARTS, autoattack
from ltat_fast.attacks.by_name import correct_under
from ltat_fast.attacks.original import original_autoattack
from ltat_fast.models.frozen import FrozenTwin

EPS = {"linf": 0.02, "l2": 0.15}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "searches", quick_searches)
    monkeypatch.setattr(pyautoattack, "AutoAttack", QuickAutoAttack)


def case(num_classes=5, n=60):
    """A network and images with their predicted classes, except for two of them."""
    net, x = small_net(num_classes, seed=4), (255 * images(n)).round().to(torch.uint8)
    y = net.eval()(x / 255).argmax(1)
    y[[3, 40]] = (y[[3, 40]] + 1) % num_classes
    return net.train(), x, y


class Memory:
    """A store in memory."""

    def __init__(self):
        self.content, self.loads = None, 0

    def save(self, tensors, position):
        self.content = {name: tensor.clone() for name, tensor in tensors.items()}, dict(position)

    def load(self):
        self.loads += self.content is not None
        return self.content


def check_examples(net, x, y, verdict, norm):
    """Every broken image has an example in the ball that the network misclassifies; the others are unchanged."""
    x, d = x / 255, verdict.x_adv - x / 255
    length = d.flatten(1).abs().amax(1) if norm == "linf" else d.flatten(1).norm(dim=1)
    assert length.max() <= EPS[norm] + 1e-6
    assert 0 <= verdict.x_adv.min() <= verdict.x_adv.max() <= 1
    assert torch.equal(net.eval()(verdict.x_adv).argmax(1) == y, verdict.robust)
    assert (d[verdict.robust] == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_verdicts_are_those_of_the_package(norm, precision):
    net, x, y = case()
    ours = autoattack(net, x, y, EPS[norm], norm=norm, precision=precision, keep_adversarial=True)
    theirs = pyautoattack.AutoAttack(net.eval(), eps=EPS[norm], norm={"linf": "Linf", "l2": "L2"}[norm], seed=0)
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
    x_adv, _ = theirs.run_standard_evaluation(x / 255, y)
    expected = net(x_adv).argmax(1) == y
    assert 5 < expected.sum() < 55
    assert (ours.robust != expected).sum() <= 1  # other random starts
    check_examples(net, x, y, ours, norm)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_breaks_as_much_as_that_of_the_package(part):
    net, x, y = case()
    ours = autoattack(net, x, y, EPS["linf"], parts=[part], precision="fp32", keep_adversarial=True)
    net.eval()
    theirs = pyautoattack.AutoAttack(net, eps=EPS["linf"], seed=0, version="custom", attacks=[part])
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = 4
    theirs.apgd.n_restarts = theirs.fab.n_restarts = 1
    theirs.square.n_queries = QUERIES
    theirs.apgd.n_iter = theirs.apgd_targeted.n_iter = theirs.fab.n_iter = STEPS
    x_adv, _ = theirs.run_standard_evaluation(x / 255, y)
    assert abs(ours.robust.sum() - (net(x_adv).argmax(1) == y).sum()) <= (6 if part == "square" else 2)
    assert ours.robust.sum() < 58
    check_examples(net, x, y, ours, "linf")
    assert torch.equal(correct_under(part, FrozenTwin(net), x, y, EPS["linf"]), ours.robust)


def test_batches_and_processes_do_not_change_the_verdicts():
    net, x, y = case()
    whole = autoattack(net, x, y, EPS["linf"]).robust
    assert 5 < whole.sum() < 55
    assert torch.equal(autoattack(net, x, y, EPS["linf"], batch_size=25).robust, whole)
    some = torch.tensor([1, 3, 17, 18, 59])
    assert torch.equal(autoattack(net, x[some], y[some], EPS["linf"], indices=some).robust, whole[some])
    twin = FrozenTwin(net)
    parts = [correct_under("autoattack", twin, x, y, EPS["linf"], batch_size=20, part=(r, 2)) for r in (0, 1)]
    assert torch.equal(torch.cat([parts[0][:20], parts[1], parts[0][20:]]), whole)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_interruptions_do_not_change_the_verdicts(precision, monkeypatch):
    """Stopped at every 13th step, before it is saved."""
    monkeypatch.setattr(module, "SAVE_SECONDS", -1)
    net, x, y = case()
    attack = functools.partial(
        autoattack, net, x, y, EPS["linf"], batch_size=25, precision=precision, keep_adversarial=True
    )
    steps = []
    whole = attack(on_progress=steps.append)
    shares = [progress.share for progress in steps]
    assert 0 < shares[0] < 0.05
    assert shares == sorted(shares) or precision == "bf16"  # how many images are attacked again is not known before
    assert shares[-1] > 0.99
    assert (steps[0].images, steps[-1].robust) == (60, whole.robust.sum())
    assert list(dict.fromkeys(p.part for p in steps))[: len(PARTS)] == list(PARTS)

    class Stop(Exception):
        pass

    def stop(progress):
        left[0] -= 1
        if not left[0]:
            raise Stop

    store, left, resumed = Memory(), [0], None
    while resumed is None:
        left[0] = 13
        with contextlib.suppress(Stop):
            resumed = attack(store=store, on_progress=stop)
    assert store.loads > 10
    assert torch.equal(resumed.robust, whole.robust)
    assert torch.equal(resumed.x_adv, whole.x_adv)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_have_fewer_targets_and_no_targeted_apgd(num_classes):
    net, x, y = case(num_classes)
    net, parts, eps = Linear(torch.randn(num_classes, 108, generator=torch.Generator().manual_seed(1))), [], 0.02
    y = net(x / 255).argmax(1)
    robust = autoattack(net, x, y, eps, on_progress=lambda progress: parts.append(progress.part)).robust
    assert "apgd-t" not in parts
    assert {"apgd-ce", "fab-t", "square"} <= set(parts)
    x_adv = original_autoattack(net, x / 255, y, eps)
    assert 5 < robust.sum() < 58
    assert (robust != (net(x_adv).argmax(1) == y)).sum() <= 1


def test_a_linear_model_is_broken_exactly_where_it_can_be():
    weight = torch.randn(2, 27, generator=torch.Generator().manual_seed(0))
    pixels = torch.randint(90, 165, (60, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    net = Linear(weight)
    logits = net(pixels / 255)
    radius = (logits.amax(1) - logits.amin(1)) / (weight[0] - weight[1]).abs().sum()
    eps = radius.sort().values[29:31].mean().item()
    for precision in ("fp32", "bf16"):
        robust = autoattack(net, pixels, logits.argmax(1), eps, precision=precision).robust
        assert torch.equal(robust, radius > eps), precision


def test_the_network_decides_where_the_search_is_wrong(monkeypatch):
    """The search runs on another network, which misclassifies most images and has other adversarial examples."""
    net, x, y = case()
    truth = autoattack(net, x, y, EPS["linf"], precision="fp32").robust
    made = module.Network.__init__

    def misled(self, *args):
        made(self, *args)
        self.search = FrozenTwin(small_net(5, seed=5))

    monkeypatch.setattr(module.Network, "__init__", misled)
    verdict = autoattack(net, x, y, EPS["linf"], keep_adversarial=True)
    check_examples(net, x, y, verdict, "linf")
    assert truth.sum() < verdict.robust.sum() < 58


def test_logits_that_are_not_numbers_are_a_failure_of_the_network():
    """As in the original: every changed image gets NaN, and argmax then returns class 0."""

    class Fragile(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Linear(torch.randn(5, 108, generator=torch.Generator().manual_seed(1)))

        def forward(self, x):
            changed = ((255 * x - (255 * x).round()).abs() > 1e-3).flatten(1).any(1)
            return self.inner(x).masked_fill(changed[:, None], torch.nan)

    net, (_, x, _) = Fragile(), case()
    y = net(x / 255).argmax(1)
    robust = autoattack(net, x, y, 0.001, precision="fp32").robust
    assert torch.equal(robust, y == 0)
    assert 0 < robust.sum() < 60


def test_it_refuses_an_unknown_part():
    net, x, y = case()
    with pytest.raises(ValueError, match=r"'fab' is not a part of AutoAttack: choose from apgd-ce"):
        autoattack(net, x, y, 0.1, parts=["fab"])
