"""AdaIAD against its formula: IAD-I on AdaAD's examples, the teacher's predictions taken there."""

import pytest
from test_adaad import AdaAdTwin
from test_iad import OPTIONS, IadTwin

from helpers.float64_distillation import assert_equals_the_formula
from ltat_fast.methods.adaiad import AdaIad


class AdaIadTwin(IadTwin):
    target_is_adversarial = True
    objective = AdaAdTwin.objective


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_three_steps_equal_the_formula(options):
    assert AdaIad.noise == "gaussian"
    assert_equals_the_formula(AdaIad, AdaIadTwin, options)
