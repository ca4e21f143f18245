"""Logistic regression against an L_inf adversary, exactly: the finite-sample side of Theorem 1.

For a linear model the inner maximum is known, y (w.x + b) - eps ||w||_1, so adversarial training is the convex problem

    min_{w, b}  mean_i  log(1 + exp( -(y_i (w.x_i + b) - eps ||w||_1) )).

On infinite data of the two Gaussians its solution is w = 2 (eta - eps), b = ln r: where all weights are positive the
adversary merely moves both means by eps, and the log-odds of Gaussians are linear. That is the theorem's robust
classifier. The paper trains these for its figures 2 and 3 (eta 1, n 2, eps 0.5) and does not say on how many samples.
"""

import numpy as np
import torch
import torch.nn.functional as F

from ltat_fast.analysis.gaussians import CLASSES, Gaussians, linear_error


def fit(x: np.ndarray, y: np.ndarray, eps: float = 0.0) -> tuple[np.ndarray, float]:
    """Weights ``(n,)`` and bias of the logistic regression of labels ``y`` (+1, -1) on ``x`` ``(N, n)``.

    eps: the adversary of training; 0 is natural training. No regularisation. Raises ValueError if the samples are all
    of one class, or so apart that even the adversary leaves them separable: then there is no solution.
    """
    if len(np.unique(y)) < 2:
        raise ValueError("the samples are all of one class")
    points, labels = torch.from_numpy(x).double(), torch.from_numpy(y).double()
    parameters = torch.zeros(x.shape[1] + 1, dtype=torch.float64)
    parameters[:-1] = labels @ points / len(y)  # off the kink of the norm at 0
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
        raise ValueError("the samples are separable, and the weights of their logistic regression have no limit")
    return weights.numpy(), bias.item()


def fitted_errors(setting: Gaussians, count: int, fits: int) -> list[dict[tuple[str, str, str], float]]:
    """As :func:`ltat_fast.analysis.gaussians.theorem`, for natural and adversarial fits on ``count`` samples.

    Each entry is of samples of its own; the errors are exact, those of the fitted weights on infinite test data.
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
