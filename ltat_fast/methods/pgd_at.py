"""PGD-AT: cross-entropy on PGD examples (Madry et al., "Towards Deep Learning Models Resistant to Adversarial
Attacks", ICLR 2018, eq. 2.1). Also what trains the balanced self-teacher of LTAT.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ltat_fast.methods.base import Method


@dataclass
class PgdAt(Method):
    """min_w  CE(f(x'), y)  with x' = PGD on CE."""

    name: ClassVar[str] = "pgd-at"

    def loss(self, model, x, x_adv, y, progress):
        loss = F.cross_entropy(model(x_adv).float(), y)
        return loss, {"ce": loss.detach()}
