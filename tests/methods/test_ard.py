"""ARD against its formula."""

import pytest

from helpers.float64_distillation import Float64Distillation, assert_equals_the_formula, softened
from helpers.three_steps import cross_entropy, kl
from ltat_fast.methods.ard import Ard


class Float64Ard(Float64Distillation):
    def base(self, adv, x, x_adv, y):
        a, t = self.options.get("teacher_weight", 1.0), self.options.get("temperature", 1.0)
        loss = a * t**2 * kl(softened(self.teacher_logits(x), t), softened(adv, t))
        return loss if a == 1 else loss + (1 - a) * cross_entropy(self.logits(x), y)


@pytest.mark.parametrize(
    "options",
    [{}, {"igdm_alpha": 9.0}, {"teacher_weight": 0.6, "temperature": 3.0}, {"teacher_weight": 0.6, "igdm_alpha": 4.0}],
    ids=str,
)
def test_three_steps_equal_the_formula(options):
    assert_equals_the_formula(Ard, Float64Ard, options)
