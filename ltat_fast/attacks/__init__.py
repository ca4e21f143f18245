"""Attacks: the one PGD loop, what it can ascend, and AutoAttack. Needs ``ltat_fast.ops`` and nothing of the trainer."""

from ltat_fast.attacks.objectives import cross_entropy, cw_margin, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, pgd

__all__ = ["AttackConfig", "cross_entropy", "cw_margin", "pgd", "scaled_cross_entropy"]
