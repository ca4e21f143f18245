"""Fused operators for adversarial training, usable without the rest of the package.

>>> from ltat_fast.ops import pgd_init, pgd_step, balanced_softmax_kl, igdm_loss

Each has a plain-torch twin named ``<op>_ref``: the definition of what it computes, and what runs where no kernel does.
"""

from ltat_fast.ops.backends import backend_info
from ltat_fast.ops.balanced_softmax_kl import balanced_softmax_kl, balanced_softmax_kl_ref
from ltat_fast.ops.igdm import igdm_loss, igdm_loss_ref
from ltat_fast.ops.pgd import pgd_init, pgd_init_ref, pgd_step, pgd_step_ref

__all__ = [
    "backend_info",
    "balanced_softmax_kl",
    "balanced_softmax_kl_ref",
    "igdm_loss",
    "igdm_loss_ref",
    "pgd_init",
    "pgd_init_ref",
    "pgd_step",
    "pgd_step_ref",
]
