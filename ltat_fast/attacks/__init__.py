"""Attacks: the PGD loop, the objectives that it ascends, and AutoAttack. They do not depend on the trainer."""

from ltat_fast.attacks.objectives import cross_entropy, cw_margin, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, n_fgsm, pgd

__all__ = ["AttackConfig", "cross_entropy", "cw_margin", "n_fgsm", "pgd", "scaled_cross_entropy"]
