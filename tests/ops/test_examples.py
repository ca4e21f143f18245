"""The plain and the fused version of each example agree and differ in three statements, which docs/ops.md shows."""

import difflib
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from ltat_fast.ops import pgd_init, pgd_init_ref, pgd_step

ROOT = Path(__file__).parents[2]
NAMES = ["trades", "pgd_attack", "distillation"]


def load(version, name):
    spec = importlib.util.spec_from_file_location(f"{version}_{name}", ROOT / "examples" / version / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def versions(request, monkeypatch):
    """Return the plain and the fused module. The fused one draws the same start noise, so that results can agree."""
    plain, fused = (load(version, request.param) for version in ("plain", "fused"))
    if hasattr(fused, "pgd_init"):
        monkeypatch.setattr(fused, "pgd_init", pgd_init_ref)
    return plain, fused


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10)).double()


def batch():
    torch.manual_seed(1)
    # not near 0 or 1: there pgd_init clamps the start, and the plain TRADES loop does not
    return 0.1 + 0.8 * torch.rand(20, 64, dtype=torch.float64), torch.randint(0, 10, (20,))


@pytest.mark.parametrize("versions", ["trades"], indirect=True)
def test_trades_agrees(versions):
    results = []
    for module in versions:
        model, (x, y) = network(), batch()
        loss = module.trades_loss(model, x, y, steps=5)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("versions", ["pgd_attack"], indirect=True)
def test_pgd_attack_agrees(versions):
    results = []
    for module in versions:
        model, (x, y) = network(), batch()
        torch.manual_seed(2)
        results.append(module.PGD(model, eps=0.1, alpha=0.03, steps=5)(x, y))
    torch.testing.assert_close(*results)
    accuracies = [(model(images).argmax(1) == y).double().mean() for images in (x, results[1])]
    assert accuracies[1] <= accuracies[0]


@pytest.mark.parametrize("versions", ["distillation"], indirect=True)
def test_distillation_agrees(versions):
    results = []
    for module in versions:
        student, teacher, (x, y) = network(), network(5), batch()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        counts = torch.arange(10.0, 0.0, -1.0)
        losses = [module.distillation_step(student, teacher, optimizer, x, y, counts) for _ in range(5)]
        results.append([*losses, *(p.detach() for p in student.parameters())])
    torch.testing.assert_close(*results)


def test_budgets_of_the_page():
    """The Python code in docs/ops.md: a budget per image, and PGD on normalised images."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ops.md").read_text(), re.DOTALL)
    x, grad, labels = torch.rand(8, 3, 5, 5), torch.randn(8, 3, 5, 5), torch.arange(8) % 4
    class_eps, mean, std = torch.tensor([0.0, 0.02, 0.03, 0.04]), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    names = {"x": x, "x_adv": x, "grad": grad, "labels": labels, "class_eps": class_eps, "MEAN": mean, "STD": std}
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    names |= {"z": (x - mean) / std, "torch": torch, "pgd_init": pgd_init, "pgd_step": pgd_step}
    exec(code, names)
    moved = (names["x_adv"] - x).abs().amax((1, 2, 3))
    torch.testing.assert_close(moved, class_eps[labels] / 4)
    pixels = names["z_adv"] * std + mean
    assert ((pixels - x).abs() < 8 / 255 + 1e-6).all()
    assert ((pixels > -1e-6) & (pixels < 1 + 1e-6)).all()
    assert (pixels - x).abs().max() > 7.9 / 255


@pytest.mark.parametrize("name", ["trades", "distillation"])
def test_fused_example_runs(name, capsys):
    load("fused", name).main(epochs=1)
    accuracy = float(capsys.readouterr().out.strip().splitlines()[-1].split()[-1].rstrip("%"))
    assert accuracy > 30  # after one epoch; chance is 10


@pytest.mark.parametrize("name", NAMES)
def test_the_guide_shows_the_three_statements_that_change(name):
    plain, fused = (
        (ROOT / "examples" / version / f"{name}.py").read_text().splitlines() for version in ("plain", "fused")
    )
    changes = [line for line in difflib.ndiff(plain, fused) if line[0] in "+-" and line[1:].strip()]
    assert len([line for line in changes if line.startswith("+")]) == 3
    guide = (ROOT / "docs/ops.md").read_text()
    for line in changes:
        assert f"{line[0]}{line[2:]}" in guide.splitlines(), line
