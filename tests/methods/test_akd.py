"""AKD against its formula: cross-entropy with a mixture of labels and predictions."""

import pytest
import torch

from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula
from helpers.three_steps import cross_entropy, kl
from ltat_fast.methods.akd import Akd


class Float64Akd(Float64Distillation):
    """Cross-entropy with the target (1 - m) onehot(y) + m p, plus the constant m sum p log p."""

    def base(self, adv, x, x_adv, y):
        m = self.options.get("teacher_weight", 0.5)
        p = self.teacher_logits(x if self.options.get("teacher_input") == "clean" else x_adv).softmax(1)
        mixed = (1 - m) * torch.eye(adv.shape[1], dtype=torch.float64)[y] + m * p
        return -(mixed * adv.log_softmax(1)).sum(1).mean() + m * (p * p.log()).sum(1).mean()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"igdm_alpha": 9.0},
        {"teacher_weight": 0.9, "teacher_input": "clean"},
        {"teacher_weight": 1.0, "igdm_alpha": 3.0},
        {"teacher_weight": 0.0},
    ],
    ids=str,
)
def test_three_steps_equal_the_formula(options):
    assert_equals_the_formula(Akd, Float64Akd, options)


def test_a_mixed_target_gives_the_mixed_loss():
    """So the reference above also checks the sum of two terms in the docstring of Akd."""
    torch.manual_seed(0)
    z, t, y = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.arange(5)
    p = t.softmax(1)
    mixed = 0.3 * torch.eye(7).double()[y] + 0.7 * p
    other = -(mixed * z.log_softmax(1)).sum(1).mean() + 0.7 * (p * p.log()).sum(1).mean()
    torch.testing.assert_close(0.3 * cross_entropy(z, y) + 0.7 * kl(p, z.softmax(1)), other)
