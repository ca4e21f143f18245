"""Theorem 1 on two Gaussians: adversarial training on long-tailed data makes the tail class less robust.

Cho, Lee, Kim, "Long-tailed Adversarial Training with Self-Distillation" (ICLR 2025), section 3.2 and appendix A.
y = +1 (head) with probability r / (r + 1), else -1 (tail); x_1 ... x_n ~ N(eta y, 1) independent; f = sign(w.x + b).
The best classifier against an adversary of radius eps' (0: natural, eps: robust) has equal weights. Scaled to norm 1 it
has the bias b* and the class errors R^y:

    b* = ln r / (2 sqrt(n) (eta - eps')),    R^y(b; eps') = Phi( -sqrt(n) (eta - eps') - y b ).

The equations (4) and (5) of the paper are R^-1 for both biases and both adversaries. Corollary 1 says that under attack
the robust classifier has the higher tail error. It needs r > 1 and 0 < eps < eta; at r = 1 both errors are equal.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

PHI = NormalDist().cdf
CLASSES = {"head": +1, "tail": -1}


@dataclass(frozen=True)
class Gaussians:
    """The two Gaussians and the adversary. ratio: r >= 1, the number of head images per tail image.

    Raises ValueError unless 0 <= eps < eta, r >= 1 and n >= 1.
    """

    ratio: float
    eta: float = 1.0
    n: int = 2
    eps: float = 0.5

    def __post_init__(self):
        if not (0 <= self.eps < self.eta and self.ratio >= 1 and self.n >= 1):
            raise ValueError(f"the theorem needs 0 <= eps < eta, ratio >= 1 and n >= 1, not {self}")

    def optimal_bias(self, eps: float) -> float:
        """b* of the best classifier against an adversary of radius ``eps``; 0 for the natural classifier."""
        return math.log(self.ratio) / (2 * math.sqrt(self.n) * (self.eta - eps))

    def error(self, bias: float, eps: float, label: int) -> float:
        """R^label of the equal-weight classifier of norm 1 with ``bias`` under an adversary of radius ``eps``."""
        return PHI(-math.sqrt(self.n) * (self.eta - eps) - label * bias)

    def sample(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw x ``(count, n)`` and y ``(count,)`` from the mixture."""
        y = np.where(rng.random(count) < self.ratio / (self.ratio + 1), 1, -1)
        return rng.normal(self.eta * y[:, None], 1.0, (count, self.n)), y


def linear_error(setting: Gaussians, weights: np.ndarray, bias: float, eps: float, label: int) -> float:
    """R^label of any linear classifier. Its margin under attack is N(eta sum w + y b - eps ||w||_1, ||w||_2^2)."""
    margin = setting.eta * weights.sum() + label * bias - eps * np.abs(weights).sum()
    return PHI(-margin / np.linalg.norm(weights))


def theorem(setting: Gaussians) -> dict[tuple[str, str, str], float]:
    """The closed-form errors by (classifier, error, class): ("nat" | "rob", "nat" | "rob", "head" | "tail")."""
    adversaries = {"nat": 0.0, "rob": setting.eps}
    return {
        (classifier, error, group): setting.error(setting.optimal_bias(trained), tested, label)
        for classifier, trained in adversaries.items()
        for error, tested in adversaries.items()
        for group, label in CLASSES.items()
    }


def monte_carlo(setting: Gaussians, count: int, rng: np.random.Generator) -> dict[tuple[str, str, str], float]:
    """The same errors measured on ``count`` samples per class, each moved by the adversary and then classified."""
    weights = np.full(setting.n, setting.n**-0.5)
    adversaries = {"nat": 0.0, "rob": setting.eps}
    rates = {}
    for group, label in CLASSES.items():
        x = rng.normal(setting.eta * label, 1.0, (count, setting.n))
        for error, tested in adversaries.items():
            moved = x - label * tested * np.sign(weights)
            for classifier, trained in adversaries.items():
                predicted = np.sign(moved @ weights + setting.optimal_bias(trained))
                rates[classifier, error, group] = float((predicted != label).mean())
    return rates


def corollary_gap(setting: Gaussians) -> float:
    """R_rob^-1(f_rob) - R_rob^-1(f_nat): positive if r > 1 and 0 < eps < eta, 0 if r = 1 or eps = 0."""
    errors = theorem(setting)
    return errors["rob", "rob", "tail"] - errors["nat", "rob", "tail"]
