"""ARD: adversarially robust distillation. With a = teacher_weight and t = temperature:

    L = a t^2 KL(T(x) / t || S(x') / t) + (1 - a) CE(S(x), y),   x' = PGD on CE

Source: Goldblum, Fowl, Feizi, Goldstein, "Adversarially Robust Distillation", AAAI 2020.

The defaults are those of the comparison in the IGDM paper: teacher_weight 1 and temperature 1.

Departures from the authors' code, besides those of :mod:`ltat_fast.methods.distillation`:
- Their temperature is 30.
- Their KL is divided by the number of classes (``--loss-scale``).
- Their attack runs in train mode, from a start that is not clipped.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.distillation import Distillation, kl, widen


@dataclass
class Ard(Distillation):
    """min_w  a t^2 KL(T(x) / t || S(x') / t) + (1 - a) CE(S(x), y),   a = teacher_weight, t = temperature."""

    name: ClassVar[str] = "ard"

    teacher_weight: float = 1.0
    """weight a of the KL between teacher and student; cross-entropy on the clean image has weight 1 - a"""
    temperature: float = 1.0
    """temperature t of the KL"""

    @property
    def smooths_labels(self) -> bool:
        """The label term is the cross-entropy on the clean image, which teacher_weight 1 leaves out."""
        return self.teacher_weight < 1

    def check(self):
        super().check()
        self._require_share("teacher_weight")
        self._require_positive("temperature")

    def distill(self, at, y, progress):
        divergence = kl(at.teacher("clean"), at.student("adv"), self.temperature).mean()
        loss = self.teacher_weight * self.temperature**2 * divergence
        parts = {"kl": divergence.detach()}
        if self.teacher_weight < 1:
            ce = F.cross_entropy(widen(at.student("clean")), y, label_smoothing=self.context.label_smoothing)
            loss = loss + (1 - self.teacher_weight) * ce
            parts["ce"] = ce.detach()
        return loss, parts
