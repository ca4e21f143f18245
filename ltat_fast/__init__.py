"""Fused kernels and a fast trainer for long-tailed adversarial training.

Importing this package imports neither torch nor a dataset. To use only the operators, import them with
``from ltat_fast.ops import pgd_init, pgd_step, balanced_softmax_kl, igdm_loss``.
"""

__version__ = "0.1.0"
