"""REAT: balanced softmax, and a term on the features h of the adversarial examples of tail classes.

    L = BSL(f(x'), y) + tail_weight L_tail,   x' = PGD on CE with class weights
    KL_bj = KL(q_b || q_j),   q = softmax of h over its d coordinates,   q_b without gradient
    W_bj = omega_{y_b} + omega_{y_j},   with a minus sign if y_b = y_j;   omega_c = sqrt(N / n_c)
    L_tail = mean over tail samples b of  mean_j(KL_bj) / d * mean_j(W_bj)         "as-coded": the authors' code
                                          mean_j(W_bj KL_bj)                       "pairwise": what seems to be intended

Source: Li, Xu, Zhang, "Alleviating the Effect of Data Imbalance on Adversarial Training", 2023.

Tail classes: sort the C classes from frequent to rare and count the ranks from 0. The classes of rank
2 floor(C / 3) + 1 and higher are tail classes. With three classes there are none. The authors' code uses the class
index, which equals the rank on its datasets.

Class weights of the attack: the inverse effective number (Cui et al., CVPR 2019) of the m_c adversarial examples that
the student predicted as class c in the previous epoch, E_c = (1 - b^m_c) / (1 - b) with b = (n_c - 1) / n_c. A positive
weight cannot change the sign of a sample's gradient, so the weights do not change the examples. The code has them
because they are part of the method.

Departures:
- The start of the attack is clipped to [0, 1].
- There is no extra forward for logging.
- Matrix operations replace the authors' quadratic loops over the batch.
- The schedule is that of the run (in their code: 80 epochs; ``--settings authors``).
- With several processes, pairs are formed within each process.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.methods.base import Method
from ltat_fast.ops import balanced_softmax_kl


@dataclass
class Reat(Method):
    """min_w  BSL(f(x'), y) + tail_weight L_tail."""

    name: ClassVar[str] = "reat"
    couples_images: ClassVar[bool] = True
    smooths_labels: ClassVar[bool] = True
    """The balanced softmax is smoothed. The tail feature term compares samples of hard classes and stays as it is."""

    tail_weight: float = 1.0
    """weight of the tail feature term L_tail"""
    tail_form: Literal["as-coded", "pairwise"] = "as-coded"
    """form of L_tail; as-coded: mean KL times mean pair weight, as in the code of the published numbers; pairwise: mean
    of each KL times the weight of its pair"""

    def wrap_model(self, model, class_counts):
        model.features_in_training = True
        return model

    def setup(self, context):
        super().setup(context)
        self._counts = context.class_counts.clamp(min=1)
        rank = self._counts.argsort(descending=True, stable=True).argsort()
        self._is_tail = rank > len(self._counts) // 3 * 2
        self._omega = (self._counts.sum() / self._counts).sqrt()
        self.class_weights = effective_number_weights(self._counts, self._counts)
        self.predicted = torch.zeros_like(self._counts)

    def state(self):
        return {"class_weights": self.class_weights, "predicted": self.predicted}

    def on_epoch_start(self, epoch):
        if epoch > 0:
            self.class_weights.copy_(effective_number_weights(self._counts, self.predicted))
        self.predicted.zero_()

    def objective(self, x_adv, logits, target):
        return F.cross_entropy(logits, target, self.class_weights.to(logits.dtype), reduction="sum")

    def loss(self, model, x, x_adv, y, progress):
        logits, features = model(x_adv)
        predicted = F.one_hot(logits.argmax(1), logits.shape[1]).sum(0)
        if dist.is_initialized():
            dist.all_reduce(predicted)
        self.predicted += predicted
        bsl = balanced_softmax_kl(logits, y, self.context.class_counts, label_smoothing=self.context.label_smoothing)
        tail = self._tail_term(features.to(logits.dtype), y)
        return bsl + self.tail_weight * tail, {"bsl": bsl.detach(), "tail": tail.detach()}

    def _tail_term(self, features: Tensor, y: Tensor) -> Tensor:
        """Return L_tail of the batch, a scalar; 0 if the batch has no tail sample. features: ``(B, d)``."""
        log_q = features.log_softmax(1)
        kl = F.kl_div(log_q[None], log_q.detach()[:, None], reduction="none", log_target=True).sum(2)
        omega = self._omega[y]
        weight = torch.where(y[:, None] == y, -1.0, 1.0) * (omega[:, None] + omega)
        if self.tail_form == "pairwise":
            per_sample = (weight * kl).mean(1)
        else:
            per_sample = kl.mean(1) / features.shape[1] * weight.mean(1)
        is_tail = self._is_tail[y]
        return torch.where(is_tail, per_sample, 0.0).sum() / is_tail.sum().clamp(min=1)


def effective_number_weights(counts: Tensor, seen: Tensor) -> Tensor:
    """Return class weights: float32 ``(C,)`` with sum C, proportional to inverse effective numbers.

    counts: ``(C,)``, training images per class. seen: ``(C,)``, samples per class whose effective number is taken.
    """
    counts = counts.double()
    weights = 1 / (counts * (1 - ((counts - 1) / counts) ** seen) + 1e-5)
    return (weights * len(weights) / weights.sum()).float()
