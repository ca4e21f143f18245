"""Fused operators for adversarial training. They need torch, and nothing else of this package.

pgd_init              random start of an attack: noise, projection on the eps-ball, clamp
pgd_step              step of an attack: sign ascent, projection on the eps-ball, clamp
balanced_softmax_kl   balanced softmax (or cross-entropy) plus distillation
igdm_loss             indirect gradient matching: kl, l1 or l2

>>> from ltat_fast.ops import pgd_init, pgd_step, balanced_softmax_kl, igdm_loss

Each ``<op>_ref`` is the definition of the op in plain torch. It also runs where no kernel can. ``backend_info`` returns
which kernel each op runs on each device.
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
