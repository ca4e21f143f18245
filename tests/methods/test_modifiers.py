"""The averaged weights, the class-wise budgets and combinations of modifiers against their formulas."""

import copy

import pytest
import torch

from helpers.float64_distillation import teacher_classifier
from helpers.float64_modifiers import Float64AtBsl, Float64Ltat, with_awp, with_budget, with_ema
from helpers.three_steps import COUNTS, EPS, HARDWARE, assert_three_steps_equal, batch, toy_classifier, train_step
from ltat_fast.methods import METHODS
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.modifiers import OFF, build
from ltat_fast.methods.modifiers.ema import WeightAverage
from ltat_fast.methods.modifiers.eps_balance import ClassBudget
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.training.backend import disagreement
from ltat_fast.training.step import TrainStep

AWP, EMA = {"awp": 0.02}, {"ema": 0.15}
BUDGET, WARMED = {"eps_balance": 0.4}, {"eps_balance": 0.3, "eps_warmup": 0.5}


def modified(base, settings):
    """Return the float64 reference ``base`` with the modifiers of ``settings``."""
    if "awp" in settings:
        base = with_awp(base, settings["awp"])
    if "eps_balance" in settings:
        base = with_budget(base, settings["eps_balance"], settings.get("eps_warmup", 0.0))
    return with_ema(base, settings["ema"]) if "ema" in settings else base


@pytest.mark.parametrize(
    "settings", [EMA, BUDGET, WARMED, AWP | EMA, AWP | WARMED, EMA | WARMED, AWP | EMA | BUDGET], ids=str
)
@pytest.mark.parametrize(("method", "base"), [(AtBsl, Float64AtBsl), (Ltat, Float64Ltat)])
def test_three_steps_equal_the_formula(method, base, settings):
    teacher = teacher_classifier() if method is Ltat else None
    assert_three_steps_equal(method(), modified(base, settings), tolerance=1e-6, teacher=teacher, **settings)


# -- which modifiers are on -----------------------------------------------------------------------------------------


def test_without_settings_all_modifiers_are_off():
    for method in METHODS.values():
        built = build(method(), toy_classifier(PgdAt()), torch.tensor(COUNTS))
        assert (built == OFF) is (method.name != "awp")
    assert OFF.strengths(3, 1, 10, 20) == OFF.state() == {}


def test_a_method_without_an_attack_has_no_budgets():
    built = build(Natural(), toy_classifier(Natural()), torch.tensor(COUNTS), awp=0.01, ema=0.9, eps_balance=0.3)
    assert built.budget is None
    assert built.awp
    assert built.ema


# -- averaged weights -----------------------------------------------------------------------------------------------


def test_the_decay_follows_its_schedule():
    """100 epochs of 109 steps: a copy in the first 2.5 % of the steps, then a slow start, then the given decay."""
    average = WeightAverage(toy_classifier(PgdAt()), 0.995)
    steps = 100 * 109
    decays = [average.decay_at(step, steps) for step in range(steps)]
    assert decays[:273] == [0.0] * 273
    assert decays[273:276] == [1 / 10, 2 / 11, 3 / 12]
    assert decays == sorted(decays)
    assert decays[-1] == 0.995
    assert 0.99 < decays[273 + 1000] < 0.995


def test_a_decay_of_zero_gives_a_bit_equal_copy():
    net, other = (toy_classifier(PgdAt(), seed).float() for seed in (0, 1))
    average = WeightAverage(net, 0.9)
    average.weight.fill_(1.0)
    average.update(other)
    for own, live in zip(average.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(own, live)
        assert own.data_ptr() != live.data_ptr()
        assert not own.requires_grad


def test_the_statistics_of_batch_norm_are_copied_and_not_averaged():
    net = toy_classifier(PgdAt())
    step = train_step(PgdAt(), net, ema=0.9)
    before = copy.deepcopy(dict(net.named_buffers()))
    step(*batch(), lr=0.1, progress=1.0, seed=0)
    average = step.modifiers.ema
    for name, buffer in average.model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    average.copy_buffers(net)
    for name, buffer in average.model.named_buffers():
        assert torch.equal(buffer, net.get_buffer(name)), name
        assert not torch.equal(buffer, before[name]), name
    assert not average.model.training


# -- class-wise budgets ---------------------------------------------------------------------------------------------


def test_published_budgets_of_cifar10_lt():
    """RobustLT, CIFAR-10-LT with imbalance ratio 50 and a = 0.3: 5.6 / 255 for the head and 12.9 / 255 for the tail."""
    counts = torch.tensor([round(5000 * 50 ** (-c / 9)) for c in range(10)])
    eps = 8 * ClassBudget(counts, 0.3, 0.8).share
    assert eps[0] == pytest.approx(5.6, abs=0.05)
    assert eps[-1] == pytest.approx(12.9, abs=0.05)
    assert (counts * eps).sum() / counts.sum() == pytest.approx(8)


def test_equal_classes_have_the_plain_eps():
    assert ClassBudget(torch.full((10,), 57), 0.3, 0.0).share.tolist() == [1.0] * 10


def test_the_warm_up_starts_with_clean_images():
    budget = ClassBudget(torch.tensor(COUNTS), 0.3, 0.8)
    assert [budget.warm_up_in(epoch, 100) for epoch in (0, 20, 40, 80, 99)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert ClassBudget(torch.tensor(COUNTS), 0.3, 0.0).warm_up_in(0, 100) == 1.0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.uses_attack])
def test_every_method_trains_within_the_budget(name):
    """Also within a budget of 0, in which all adversarial images are the clean ones."""
    method = METHODS[name]()
    step = train_step(method, toy_classifier(method), teacher=teacher_classifier(), eps_balance=0.4)
    x, y = batch()
    for factor in (0.0, 1.0):
        step.restart()
        step(x, y, lr=0.01, progress=0.5, seed=0, budget=factor)
        x_adv = step.perturb(x, y)
        radius = EPS * factor * step.modifiers.budget.share[y]
        moved = (x_adv - x).abs().amax((1, 2, 3))
        assert (moved <= radius + 1e-9).all()
        assert (moved >= radius - 1e-9).all() or method.noise == "gaussian"
        assert step.totals()["first_bad"] == -1
        assert all(p.isfinite().all() for p in step.model.parameters())


# -- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_compiled_step_with_all_modifiers_equals_the_eager_step():
    method = AtBsl()
    eager = train_step(method, allow_joint_calls(toy_classifier(method).float()), **AWP, **EMA, **BUDGET)
    compiled = TrainStep(
        eager.model, method, eager.optimizer, eager.attack, HARDWARE, "step", modifiers=eager.modifiers
    )
    x, y = batch()
    results = [step.trial(x.float(), y) for step in (compiled, eager)]
    assert disagreement(*results, eager) == ""
