"""Fused kernels and a fast trainer for long-tailed adversarial training.

Importing this package is light: it pulls in neither torch nor any dataset. Take the ops alone with
``from ltat_fast.ops import pgd_init, pgd_step, balanced_softmax_kl, igdm_loss``.
"""

__version__ = "0.1.0"
