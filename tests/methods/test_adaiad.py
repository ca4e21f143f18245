"""AdaIAD against its formula: IAD-I with the attack of AdaAD and the teacher's target at the adversarial image."""

import pytest
from test_adaad import Float64AdaAd
from test_iad import OPTIONS, Float64Iad

from helpers.float64_distillation import assert_equals_the_formula
from ltat_fast.methods.adaiad import AdaIad


class Float64AdaIad(Float64Iad):
    target_is_adversarial = True
    objective = Float64AdaAd.objective


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_steps_equal_the_formula(options):
    assert AdaIad.noise == "gaussian"
    assert_equals_the_formula(AdaIad, Float64AdaIad, options)
