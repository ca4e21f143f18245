"""A one-step training attack that no longer finds adversarial examples is noticed at the end of the epoch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from helpers.toy_stage import EPOCHS, HARDWARE, Method, saved, stage
from ltat_fast.attacks import AttackConfig, n_fgsm
from ltat_fast.methods.modifiers import Modifiers
from ltat_fast.methods.modifiers.eps_balance import ClassBudget
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.runs.records import read_metrics
from ltat_fast.training import fit as fit_module
from ltat_fast.training.collapse import ONE_STEP, PGD10, Collapsed, collapse, one_step_health
from ltat_fast.training.fit import fit

EPS = 0.1


class Pit(nn.Module):
    """Class 0 everywhere, except where the pixel is EPS / 2 +- 0.26 EPS away from 0.5.

    The gradient points into the pit from everywhere, and a step of size EPS jumps across it.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1 / EPS))

    def forward(self, x):
        distance = (x.flatten(1) - 0.5).abs() * self.scale - 0.5
        return torch.cat([distance.square() - 0.26**2, torch.zeros_like(distance)], 1)


def health(model: nn.Module, attack: AttackConfig) -> dict[str, float]:
    step = SimpleNamespace(split=lambda x: (x,), frozen=FrozenTwin(model, fold_bn=False), attack=attack)
    return one_step_health(step, torch.full((2000, 1, 1, 1), 0.5), torch.zeros(2000, dtype=torch.int64), EPS)


def test_a_network_that_only_resists_one_step_is_noticed():
    measured = health(Pit(), n_fgsm(EPS))
    assert measured[ONE_STEP] == pytest.approx(61, abs=4)  # start points at 0.5 to 0.76 and 1.24 to 1.76 EPS end in it
    assert measured[PGD10] < 10
    assert "61 % are correct under it" in collapse(measured | {ONE_STEP: 61.0})


def test_a_linear_network_has_not_collapsed():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.margin = nn.Parameter(torch.tensor(1.5 * EPS))

        def forward(self, x):
            return torch.cat([self.margin - (x.flatten(1) - 0.5), torch.zeros(len(x), 1)], 1)

    measured = health(Linear(), n_fgsm(EPS))
    assert measured[PGD10] == 100
    assert measured[ONE_STEP] == pytest.approx(62.5, abs=4)  # noise above EPS / 2 takes a step of EPS over the margin
    assert collapse(measured) == ""


@pytest.mark.parametrize(
    ("one_step", "pgd10", "collapsed"),
    [(90, 2, True), (60, 29, True), (60, 31, False), (20, 1, False), (45, 45, False), (0, 0, False)],
)
def test_the_rule(one_step, pgd10, collapsed):
    assert bool(collapse({ONE_STEP: one_step, PGD10: pgd10})) is collapsed


@pytest.fixture
def collapses_in_epoch_2(monkeypatch):
    results = iter([{ONE_STEP: 40.0, PGD10: 35.0}, {ONE_STEP: 95.0, PGD10: 1.0}, {ONE_STEP: 40.0, PGD10: 35.0}])
    monkeypatch.setattr(fit_module, "one_step_health", lambda *_: next(results))


@pytest.mark.usefixtures("unmeasured", "collapses_in_epoch_2")
def test_a_collapse_is_a_warning(tmp_path, capsys):
    fit(stage(tmp_path, attack_steps=1, step_size="0.1"), HARDWARE)
    assert [r[PGD10] for r in read_metrics(tmp_path / "metrics.jsonl")] == [35, 1, 35]
    said = capsys.readouterr().out
    assert said.count("catastrophic overfitting") == 1
    assert "WARNING: student: after epoch 2 the one-step attack has collapsed" in said


@pytest.mark.usefixtures("unmeasured", "collapses_in_epoch_2")
def test_a_collapse_ends_the_run_and_resume_continues_it(tmp_path):
    with pytest.raises(Collapsed, match=r"after epoch 2 .* the state is saved; the best epoch is 2"):
        fit(stage(tmp_path, attack_steps=1, step_size="0.1", on_collapse="stop"), HARDWARE)
    assert saved(tmp_path)["epoch"] == 2
    assert fit(stage(tmp_path, attack_steps=1, step_size="0.1"), HARDWARE).finished


def examined(folder) -> list[bool]:
    return [PGD10 in record for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("weak", [{"attack_steps": 2, "step_size": "0.1"}, {"attack_steps": 1, "step_size": "0.05"}])
def test_only_one_step_of_at_least_eps_is_examined(tmp_path, weak):
    fit(stage(tmp_path, **weak), HARDWARE)
    assert examined(tmp_path) == [False] * EPOCHS


@pytest.mark.usefixtures("unmeasured")
def test_the_warm_up_of_a_budget_is_not_examined(tmp_path):
    warming = stage(tmp_path, attack="n-fgsm")
    budget = ClassBudget(torch.tensor([9, 3, 1]), balance=0.2, warm_up_share=2 / EPOCHS)
    fit(replace(warming, modifiers=Modifiers(budget=budget)), HARDWARE)
    assert examined(tmp_path) == [False, False, True]


@pytest.mark.usefixtures("unmeasured")
def test_a_stage_without_attack_is_not_examined(tmp_path):
    class Later(Method):
        attack_begin = 1 / EPOCHS

    fit(stage(tmp_path, Later(), attack="n-fgsm"), HARDWARE)
    assert examined(tmp_path) == [False, True, True]
