"""Base class of the distillation methods: a frozen robust teacher T, the KL, and IGDM as an optional term.

    L = loss_scale L_method + igdm_alpha (e / E) IGDM,   epoch e of E epochs

:mod:`ltat_fast.methods.igdm` has the second term. The IGDM paper's alpha for RSLAD is a tenth of that of the other
methods, because the loss of RSLAD is a tenth of their losses.

Every KL is KL(teacher || student), summed over classes and averaged over the batch.

As in the authors' code of IGDM, the default temperature is 1, and the attack runs in eval mode. The original code of
some methods differs; their modules say so.

Departure: the start of every attack is clipped to [0, 1]. The original code of ARD, RSLAD and AdaAD clips only after
the first step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ltat_fast.methods.base import Parts, TeacherKind
from ltat_fast.methods.igdm import Logits, WithIgdm


def widen(logits: Tensor) -> Tensor:
    """Return ``logits`` in float32. Float64 stays float64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(softmax(target / temperature) || softmax(logits / temperature)) per row, float32 ``(B,)``.

    target, logits: ``(B, C)``. Gradients flow into both. Float64 stays float64.
    """
    log_p = (widen(target) / temperature).log_softmax(1)
    log_q = (widen(logits) / temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


@dataclass
class Distillation(WithIgdm):
    """Base class of the distillation methods. A subclass defines its loss in :meth:`distill`."""

    teacher: ClassVar[TeacherKind] = "robust"

    loss_scale: float = 1.0
    """factor on the loss without IGDM; 1 / number of classes matches authors' code that averages a KL over classes"""
    extra_clean_forward: bool = False
    """run the student on the clean images even if the loss does not need it, as the authors' code does; this changes
    only the running statistics of batch norm"""

    def distill(self, at: Logits, y: Tensor, progress: Tensor) -> tuple[Tensor, Parts]:
        """Return the loss without IGDM and its parts. ``y``, ``progress`` and results as in :meth:`Method.loss`."""
        raise NotImplementedError

    def loss(self, model, x, x_adv, y, progress):
        at = self.logits(model, x, x_adv)
        loss, parts = self.distill(at, y, progress)
        loss = self.loss_scale * loss
        if self.extra_clean_forward:
            with torch.no_grad():
                at.student("clean")
        return self.add_igdm(loss, parts, at, progress)
