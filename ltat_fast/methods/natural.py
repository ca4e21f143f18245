"""Standard training, without an attack.

    L = CE(f(x), y)

It trains the teacher of IGD, and it shows how much clean accuracy robustness costs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.base import Method
from ltat_fast.methods.distillation import widen


@dataclass
class Natural(Method):
    """min_w  CE(f(x), y)."""

    name: ClassVar[str] = "natural"
    smooths_labels: ClassVar[bool] = True
    uses_attack: ClassVar[bool] = False

    def loss(self, model, x, x_adv, y, progress):
        loss = F.cross_entropy(widen(model(x)), y, label_smoothing=self.context.label_smoothing)
        return loss, {"ce": loss.detach()}
