"""AdaIAD: IAD-I with the attack of AdaAD, and with the teacher's target at the adversarial image. With
a = teacher_weight, t = temperature, b = trust_power:

    L = a t^2 KL(T(x') / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y)
    w_i = softmax(T(x'_i))[y_i]^b,   x' = PGD on KL(T(x') || S(x'))

Source: Huang et al., "Boosting Accuracy and Robustness of Student Models via Adaptive Adversarial Distillation", CVPR
2023.

Departures from the authors' code, besides those of :mod:`ltat_fast.methods.distillation`:
- Their default temperature is 30. Ours is 1, which agrees with the tables of the IGDM paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.adaad import AdaAd
from ltat_fast.methods.base import Noise
from ltat_fast.methods.iad import Iad
from ltat_fast.methods.igdm import Point


@dataclass
class AdaIad(Iad):
    """min_w  a t^2 KL(T(x') / t || S(x') / t) + a mean_i (1 - w_i) KL(S(x_i) || S(x'_i)) + (1 - a) CE(S(x), y)."""

    name: ClassVar[str] = "adaiad"
    noise: ClassVar[Noise] = AdaAd.noise
    target_at: ClassVar[Point] = "adv"

    objective = AdaAd.objective
