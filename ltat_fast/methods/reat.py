"""REAT (Li, Xu, Zhang, "Alleviating the Effect of Data Imbalance on Adversarial Training", 2023): balanced softmax, and
a term on the features h of the adversarial examples of tail classes.

    L = BSL(f(x'), y) + L_tail
    q = softmax h over its d coordinates,  KL_bj = KL(q_b || q_j) with q_b held constant
    W_bj = -+ (omega_{y_b} + omega_{y_j}), minus where y_b = y_j;   omega_c = sqrt(N / n_c)
    L_tail = mean over tail samples b of  mean_j(KL_bj) / d * mean_j(W_bj)         as the authors' code computes it
                                          mean_j(W_bj KL_bj)                       pairwise, as it seems to be meant

Tail classes are the rarer ones, from rank 2 floor(C / 3) + 1 on, counted from 0 (the authors' code takes the index,
which is the rank on its datasets); of three classes there is none. The attack ascends cross-entropy with a weight for
each class, the inverse effective number (Cui et al. 2019) of adversarial examples that were predicted as it in the
epoch before: E_c = (1 - b^m_c) / (1 - b), b = (n_c - 1) / n_c. A positive weight cannot change the sign of a sample's
gradient, so this leaves the examples as they are; it is here because it is part of the method.

Departures: the start is clipped; no forward for logging; quadratic loops over the batch are matrices; the schedule of
the run (theirs: 80 epochs). In several processes pairs are formed within a process.
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

    tail_weight: float = 1.0
    """weight of the tail feature term"""
    tail_form: Literal["as-coded", "pairwise"] = "as-coded"
    """as-coded: mean divergence times mean pair weight, what the published numbers come from; pairwise: each
    divergence times its pair's weight"""

    def wrap_model(self, model, class_counts):
        model.features_in_training = True
        return model

    def setup(self, context):
        super().setup(context)
        counts = self._counts = context.class_counts.clamp(min=1)
        rank = counts.argsort(descending=True, stable=True).argsort()
        self._is_tail = rank > len(counts) // 3 * 2
        self._omega = (counts.sum() / counts).sqrt()
        self.class_weights = effective_number_weights(counts, counts)
        self.predicted = torch.zeros_like(counts)

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
        bsl = balanced_softmax_kl(logits, y, self.context.class_counts)
        tail = self._tail_term(features.to(logits.dtype), y)
        return bsl + self.tail_weight * tail, {"bsl": bsl.detach(), "tail": tail.detach()}

    def _tail_term(self, features: Tensor, y: Tensor) -> Tensor:
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
    """Float32 ``(C,)`` of sum C: inverse effective numbers of ``seen`` samples of classes with ``counts`` samples."""
    counts = counts.double()
    weights = 1 / (counts * (1 - ((counts - 1) / counts) ** seen) + 1e-5)
    return (weights * len(weights) / weights.sum()).float()
