"""Theorem 1: closed forms against scipy, sampling and optimisation; logistic regression against scikit-learn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression

from helpers import small_disks, train_runs
from ltat_fast.analysis.gaussians import Gaussians, corollary_gap, linear_error, monte_carlo, theorem
from ltat_fast.analysis.logistic import fit, fitted_errors

PAPER = [Gaussians(r) for r in (1.0, 2.0, 5.0)]
CASES = [*PAPER, Gaussians(20.0, eta=0.7, n=5, eps=0.3), Gaussians(3.0, eta=0.5, n=1, eps=0.1)]


def total_error(case: Gaussians, bias: float, eps: float) -> float:
    """The error over both classes, weighted by their frequency."""
    return (case.ratio * case.error(bias, eps, +1) + case.error(bias, eps, -1)) / (case.ratio + 1)


@pytest.mark.parametrize("case", CASES)
def test_the_papers_four_equations(case):
    root, log_r = math.sqrt(case.n), math.log(case.ratio)
    eta, near = case.eta, case.eta - case.eps
    tail = {
        ("nat", "nat"): norm.cdf(-root * eta + log_r / (2 * root * eta)),
        ("nat", "rob"): norm.cdf(-root * near + log_r / (2 * root * eta)),
        ("rob", "nat"): norm.cdf(-root * eta + log_r / (2 * root * near)),
        ("rob", "rob"): norm.cdf(-root * near + log_r / (2 * root * near)),
    }
    errors = theorem(case)
    for (classifier, error), expected in tail.items():
        assert errors[classifier, error, "tail"] == pytest.approx(expected, rel=1e-12)
        assert errors[classifier, error, "head"] <= errors[classifier, error, "tail"] + 1e-15


@pytest.mark.parametrize("case", CASES)
def test_sampling_agrees_with_the_closed_forms(case):
    draws = 200_000
    measured = monte_carlo(case, draws, np.random.default_rng(1))
    for key, p in theorem(case).items():
        assert abs(measured[key] - p) < 4 * math.sqrt(p * (1 - p) / draws), key


def test_the_adversary_of_the_sampling_is_the_strongest():
    """Compared with all corners of the ball, on samples of the mixture."""
    case = Gaussians(5.0, n=3)
    x, y = case.sample(20_000, np.random.default_rng(2))
    bias, weights = case.optimal_bias(case.eps), np.full(3, 3**-0.5)
    corners = case.eps * np.array(list(itertools.product([-1, 1], repeat=3)))
    wrong = ((x[:, None, :] + corners) @ weights + bias) * y[:, None] <= 0
    for label, group in ((1, "head"), (-1, "tail")):
        rate, p = wrong.any(1)[y == label].mean(), theorem(case)["rob", "rob", group]
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / (y == label).sum())
    assert abs((y == 1).mean() - 5 / 6) < 4 * math.sqrt(5 / 36 / len(y))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("which", ["natural", "robust"])
def test_the_bias_is_the_best(case, which):
    eps = case.eps if which == "robust" else 0.0
    found = minimize_scalar(lambda b: total_error(case, b, eps), bracket=(-1, 1), tol=1e-12)
    assert case.optimal_bias(eps) == pytest.approx(found.x, abs=1e-5)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_equal_weights_are_the_best(eps):
    """Lemmas 1 and 2: numerical minimisation over all linear classifiers from several starts."""
    case, rng = Gaussians(5.0), np.random.default_rng(0)

    def total(p):
        head, tail = (linear_error(case, p[:2], p[2], eps, label) for label in (1, -1))
        return (case.ratio * head + tail) / (case.ratio + 1)

    for _ in range(3):
        start = [*rng.uniform(0.2, 2, 2), rng.normal()]
        found = minimize(total, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000})
        assert found.fun == pytest.approx(total_error(case, case.optimal_bias(eps), eps), abs=1e-9)
        assert found.x[:2] / np.linalg.norm(found.x[:2]) == pytest.approx([0.5**0.5] * 2, abs=1e-3)


FEASIBLE = st.builds(
    lambda ratio, eta, n, share: Gaussians(ratio, eta, n, share * eta),
    st.floats(1.01, 100),
    st.floats(0.3, 2),
    st.integers(1, 8),
    st.floats(0.02, 0.8),
)


@given(FEASIBLE)
@settings(max_examples=200, deadline=None)
def test_corollary(case):
    """The biases are compared, because the errors of both can round to 1."""
    assert case.optimal_bias(case.eps) > case.optimal_bias(0.0)
    assert corollary_gap(case) >= 0
    errors = theorem(case)
    if 1e-9 < errors["nat", "rob", "tail"] < 1 - 1e-9:
        assert corollary_gap(case) > 0
    assert errors["rob", "nat", "tail"] >= errors["nat", "nat", "tail"]
    assert errors["rob", "rob", "head"] <= errors["nat", "rob", "head"], "what the tail loses, the head gains"
    robust, natural = (total_error(case, case.optimal_bias(eps), case.eps) for eps in (case.eps, 0.0))
    assert robust <= natural + 1e-15, "equal up to rounding where both errors are the share of the tail class"


def test_the_corollarys_conditions():
    assert corollary_gap(Gaussians(1.0)) == 0
    assert corollary_gap(Gaussians(5.0, eps=0.0)) == 0
    assert corollary_gap(Gaussians(2.0)) == pytest.approx(0.0921, abs=1e-4)
    for wrong in ({"eps": 1.0}, {"eps": 1.5}, {"eps": -0.1}, {"ratio": 0.5}, {"n": 0}):
        with pytest.raises(ValueError, match="the theorem needs"):
            Gaussians(**({"ratio": 2.0} | wrong))


def test_errors_grow_with_the_ratio():
    errors = [theorem(Gaussians(r)) for r in (1.0, 1.5, 2.0, 5.0, 50.0)]
    for key in errors[0]:
        values = [e[key] for e in errors]
        assert values == sorted(values, reverse=key[2] == "head")


def test_natural_logistic_regression_is_scikit_learns():
    x, y = Gaussians(5.0, n=3).sample(400, np.random.default_rng(0))
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    weights, bias = fit(x, y)
    assert weights == pytest.approx(reference.coef_[0], rel=1e-4)
    assert bias == pytest.approx(reference.intercept_[0], rel=1e-4)


def test_adversarial_logistic_regression_solves_the_min_max_problem():
    """The inner maximum is found by trying every corner, the outer minimum by an optimiser without gradients."""
    case = Gaussians(3.0)
    x, y = case.sample(200, np.random.default_rng(4))
    corners = case.eps * np.array(list(itertools.product([-1, 1], repeat=2)))

    def worst(p):
        margins = y[:, None] * ((x[:, None, :] + corners) @ p[:2] + p[2])
        return np.logaddexp(0, -margins).max(1).mean()

    weights, bias = fit(x, y, case.eps)
    options = {"xatol": 1e-8, "fatol": 1e-13, "maxiter": 4000}
    found = minimize(worst, [0.5, 0.5, 0.0], method="Nelder-Mead", options=options)
    assert [*weights, bias] == pytest.approx(found.x, abs=1e-4)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_logistic_regression_tends_to_the_theorem(eps):
    """w = 2 (eta - eps), b = ln r; the tolerance is four times the scatter at this sample size."""
    x, y = Gaussians(5.0).sample(200_000, np.random.default_rng(0))
    weights, bias = fit(x, y, eps)
    assert weights == pytest.approx([2 * (1 - eps)] * 2, abs=0.06)
    assert bias == pytest.approx(math.log(5), abs=0.06)


def test_the_errors_of_a_fit_are_those_of_its_weights():
    case = Gaussians(2.0)
    (errors,) = fitted_errors(case, 300, 1)
    weights, bias = fit(*case.sample(300, np.random.default_rng(0)), case.eps)
    x, y = case.sample(400_000, np.random.default_rng(9))
    for label, group in ((1, "head"), (-1, "tail")):
        moved = x[y == label] - label * case.eps * np.sign(weights)
        rate, p = (label * (moved @ weights + bias) <= 0).mean(), errors["rob", "rob", group]
        assert abs(rate - p) < 4 * math.sqrt(p * (1 - p) / (y == label).sum())


def test_samples_without_a_solution_are_refused():
    x = np.array([[-3.0], [-2.5], [2.0], [3.0]])
    with pytest.raises(ValueError, match="separable"):
        fit(x, np.array([-1, -1, 1, 1]), 0.5)
    with pytest.raises(ValueError, match="one class"):
        fit(x, np.ones(4))


def test_the_command(tmp_path, capsys):
    flags = ("--fits", "3", "--samples", "300", "--draws", "2000", "--out", str(tmp_path / "new"))
    assert train_runs.status_of("analysis.theorem", *flags) == 0
    text = capsys.readouterr().out
    assert "66.67" in text, "the tail's robust error after adversarial training at IR 5"
    assert "IR 5: R_rob(f_rob) - R_rob(f_nat) of the tail is 0.2217, above 0 in 3 of 3" in text
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "new").iterdir()}
    assert set(sizes) == {"theory-boundaries.png", "theory-tail-accuracy.png"}
    assert min(sizes.values()) > 10_000


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    quick = ("--fits", "2", "--samples", "300", "--draws", "1000", "--ratios", "5", "--out")
    (tmp_path / "file").touch()
    assert train_runs.status_of("analysis.theorem", *quick, str(tmp_path / "file")) == 2
    assert capsys.readouterr().err == f"ltat_fast: error: {tmp_path / 'file'} is a file, not a folder\n"
    with small_disks.file_system(tmp_path / "disk", "12k") as disk:
        assert train_runs.status_of("analysis.theorem", *quick, str(disk)) == 2
        assert "theory-tail-accuracy.png: No space left on device" in capsys.readouterr().err
        assert [*disk.iterdir()] == []
        small_disks.remount(disk, "ro")
        assert train_runs.status_of("analysis.theorem", *quick, str(disk / "new")) == 2
        assert f"cannot write {disk / 'new'}: Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eps", "1"), "the theorem needs 0 <= eps < eta"),
        (("--ratios", "0.5"), "ratio >= 1"),
        (("--fits", "1"), "--fits 2 or more"),
        (("--samples", "2"), "give more --samples than 2"),
    ],
)
def test_refusals(flags, message, capsys):
    assert train_runs.status_of("analysis.theorem", *flags) == 2
    assert message in capsys.readouterr().err
