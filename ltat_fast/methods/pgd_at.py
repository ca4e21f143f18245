"""PGD-AT: adversarial training on PGD examples.

    L = CE(f(x'), y),   x' = PGD on CE

``--igdm-alpha`` adds indirect gradient matching (:mod:`ltat_fast.methods.igdm`), as in the IGDM paper.

Source: Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR
2018, eq. 2.1.

PGD-AT also trains the balanced self-teacher of LTAT and the robust teacher of the distillation methods.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.distillation import widen
from ltat_fast.methods.igdm import WithIgdm


@dataclass
class PgdAt(WithIgdm):
    """min_w  CE(f(x'), y),   x' = PGD on CE."""

    name: ClassVar[str] = "pgd-at"
    smooths_labels: ClassVar[bool] = True

    def loss(self, model, x, x_adv, y, progress):
        at = self.logits(model, x, x_adv)
        loss = F.cross_entropy(widen(at.student("adv")), y, label_smoothing=self.context.label_smoothing)
        return self.add_igdm(loss, {"ce": loss.detach()}, at, progress)
