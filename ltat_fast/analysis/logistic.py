"""Logistic regression against an exact L_inf adversary: Theorem 1 on finite samples.

For a linear model the worst margin is known exactly, y (w.x + b) - eps ||w||_1, so adversarial training is the convex
problem

    min_{w, b}  mean_i  log(1 + exp( -(y_i (w.x_i + b) - eps ||w||_1) )).

On infinite data of the two Gaussians its solution is w = 2 (eta - eps), b = ln r: with positive weights the adversary
only moves both means by eps, and the log-odds of Gaussians are linear. This is the robust classifier of the theorem.
The paper trains such models for its figures 2 and 3 (eta 1, n 2, eps 0.5) and does not state the number of samples.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ltat_fast.analysis.gaussians import CLASSES, Gaussians, linear_error


def fit(x: np.ndarray, y: np.ndarray, eps: float = 0.0) -> tuple[np.ndarray, float]:
    """Weights ``(n,)`` and bias of the logistic regression of labels ``y`` (+1, -1) on ``x`` ``(N, n)``.

    eps: radius of the adversary in training; 0 for natural training. There is no regularisation. Raises ValueError if
    all samples have one class, or if they are linearly separable even under the adversary: then there is no solution.
    """
    if len(np.unique(y)) < 2:
        raise ValueError("the samples are all of one class")
    points, labels = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    parameters[:-1] = labels @ points / len(y)  # not 0, where the norm has a kink
    parameters.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        weights, bias = parameters[:-1], parameters[-1]
        value = F.softplus(eps * weights.abs().sum() - labels * (points @ weights + bias)).mean()
        value.backward()
        return value

    optimizer.step(loss)
    weights, bias = parameters[:-1].detach(), parameters[-1].detach()
    if (labels * (points @ weights + bias) > eps * weights.abs().sum()).all():
        raise ValueError("the samples are linearly separable, so the logistic regression has no solution")
    return weights.numpy(), bias.item()


def fitted_errors(setting: Gaussians, count: int, fits: int) -> list[dict[tuple[str, str, str], float]]:
    """The errors of ``fits`` natural and adversarial regressions, each on its own ``count`` samples.

    Keys as in :func:`ltat_fast.analysis.gaussians.theorem`. The errors are exact: those on infinite test data.
    """
    adversaries = {"nat": 0.0, "rob": setting.eps}
    results = []
    for seed in range(fits):
        x, y = setting.sample(count, np.random.default_rng(seed))
        fitted = {name: fit(x, y, eps) for name, eps in adversaries.items()}
        results.append(
            {
                (classifier, error, group): linear_error(setting, *fitted[classifier], tested, label)
                for classifier in adversaries
                for error, tested in adversaries.items()
                for group, label in CLASSES.items()
            }
        )
    return results
