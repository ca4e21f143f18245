"""AWP: PGD-AT with adversarial weight perturbation, ``--method pgd-at --awp 0.01``. The paper's tables have it as a
method; :mod:`ltat_fast.methods.modifiers.awp` perturbs the weights of any method.

    min_w max_d  L(w + d),   ||d_l|| <= gamma ||w_l||,   L of PGD-AT

Source: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, eq. 8 and 10.
"""

from dataclasses import dataclass
from typing import ClassVar

from ltat_fast.methods.pgd_at import PgdAt


@dataclass
class Awp(PgdAt):
    """min_w max_d  CE(f(x'; w + d), y),   ||d_l|| <= gamma ||w_l||,   x' = PGD on CE."""

    name: ClassVar[str] = "awp"
    default_awp: ClassVar[float] = 0.01
