"""AdaIAD: IAD-I on AdaAD's examples, with the teacher's predictions taken there too (Huang et al., "Boosting Accuracy
and Robustness of Student Models via Adaptive Adversarial Distillation", CVPR 2023).

The authors' code defaults to temperature 30; the tables of the IGDM paper fit temperature 1. Otherwise as
:mod:`ltat_fast.methods.iad` and :mod:`ltat_fast.methods.adaad`.
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.adaad import AdaAd
from ltat_fast.methods.distillation import Point
from ltat_fast.methods.iad import Iad


@dataclass
class AdaIad(Iad):
    """min_w  a t^2 KL(T(x') / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y)."""

    name: ClassVar[str] = "adaiad"
    noise: ClassVar[str] = AdaAd.noise
    target_at: ClassVar[Point] = "adv"

    objective = AdaAd.objective
