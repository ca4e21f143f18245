"""Attacks: the PGD loop, the objectives that it ascends, and AutoAttack. They do not depend on the trainer.

:func:`evaluate` runs them on any network.
"""

from ltat_fast.attacks.evaluation import evaluate
from ltat_fast.attacks.objectives import cross_entropy, cw_margin, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, n_fgsm, pgd
from ltat_fast.attacks.results import Result

__all__ = [
    "AttackConfig",
    "Result",
    "cross_entropy",
    "cw_margin",
    "evaluate",
    "n_fgsm",
    "pgd",
    "scaled_cross_entropy",
]
