"""RobustLT: class-wise perturbation budgets that are warmed up. With n_c training images of class c, N in all:

    s_c = sqrt(ln(max n / n_c)),   kappa = a / sum_c (n_c / N) s_c,   eps_c = eps ((1 - a) + kappa s_c)
    eps_c(e) = eps_c min((e - 1) / (b E), 1) in epoch e of E, from 1;   eps_c if b = 0
    step size of image i: step_size eps_{y_i}(e) / eps

The mean of eps_c over the training images is eps. Epoch 1 trains on clean images if b is above 0. Evaluation uses eps.

Source: RobustLT, CVPR 2026, arXiv 2605.13395.

As in the authors' code, the start noise of PGD has the plain eps; the first step projects it on the budget. N-FGSM does
not project, so its noise has the radius 2 eps_c.

Where all classes have the same number of images, as in the balanced set of a teacher, eps_c is eps.
"""

import torch
from torch import Tensor


class ClassBudget:
    """The budget of each image of a batch, as a share of eps.

    class_counts: int64 ``(C,)`` on the training device. balance: a. warm_up_share: b.
    share: float64 ``(C,)``, eps_c / eps. warm_up: float64 scalar on the device, min((e - 1) / (b E), 1) of the current
    step, which the host fills.
    """

    def __init__(self, class_counts: Tensor, balance: float, warm_up_share: float):
        n = class_counts.double().clamp(min=1)
        s = (n.max() / n).log().sqrt()
        mean = (n / n.sum() * s).sum()
        relative = torch.where(mean > 0, s / mean, 1.0)
        self.share = (1 - balance) + balance * relative
        self.warm_up_share = warm_up_share
        self.warm_up = torch.ones_like(mean)

    def warm_up_in(self, epoch: int, epochs: int) -> float:
        """Return the factor of ``epoch``, from 0."""
        return min(epoch / (self.warm_up_share * epochs), 1.0) if self.warm_up_share > 0 else 1.0

    def scale(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """Return budget / eps of each image, ``(B,)``. y: int64 labels ``(B,)``."""
        return (self.share[y] * self.warm_up).to(dtype)
