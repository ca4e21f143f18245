"""The training step as public repositories write it: the reference of all benchmarks.

Plain PyTorch in float32 with torch's own defaults (on CUDA these allow TF32 in convolutions). The attack switches the
network itself to eval(). Each attack step is a sign, an addition, a minimum, a maximum and a clamp. The class prior is
a list that every step converts to a tensor. The losses come from torch.nn.functional, and the optimizer is
SGD(model.parameters(), lr, momentum, weight_decay). The code follows the formulas of the papers and is not slow on
purpose. Once per step it waits for the device, to copy the class prior, as the published code does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.attacks import AttackConfig


def perturb(net: nn.Module, x: Tensor, y: Tensor, attack: AttackConfig, start: Tensor | None = None) -> Tensor:
    """Return adversarial examples of PGD on the cross-entropy (Madry et al. 2018).

    x: float32 images ``(B, C, H, W)`` in [0, 1]. y: int64 labels ``(B,)``. start: start images; noise around ``x`` is
    drawn if None.
    """
    if start is not None:
        x_adv = start
    elif attack.noise == "gaussian":
        x_adv = torch.clamp(x + 0.001 * torch.randn_like(x), 0.0, 1.0)
    else:
        x_adv = torch.clamp(x + torch.empty_like(x).uniform_(-attack.eps, attack.eps), 0.0, 1.0)
    for _ in range(attack.steps):
        x_adv = x_adv.detach().requires_grad_()
        loss = F.cross_entropy(net(x_adv), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + attack.step_size * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, x - attack.eps), x + attack.eps)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    return x_adv


def balanced_softmax(logits: Tensor, y: Tensor, class_counts: list[int]) -> Tensor:
    """Return the cross-entropy of logits + log n, n the class counts (Ren et al. 2020, eq. 3)."""
    prior = torch.tensor(class_counts, dtype=logits.dtype, device=logits.device).log()
    return F.cross_entropy(logits + prior.unsqueeze(0).expand(len(logits), -1), y)


def gradient_matching(plus: Tensor, minus: Tensor, teacher_plus: Tensor, teacher_minus: Tensor) -> Tensor:
    """Return the KL divergence between softmaxed logit differences of teacher and student (Lee et al. 2025, eq. 8)."""
    target = F.softmax(teacher_plus - teacher_minus, dim=1)
    return F.kl_div(F.log_softmax(plus - minus, dim=1), target, reduction="batchmean")


class ReferenceStep:
    """One training step of LTAT, balanced softmax + alpha * progress * gradient matching; without a teacher, of AT-BSL.

    compiled: apply torch.compile to each network and to both losses, as a user would.
    attacked: network under attack; ``model`` if None. The published code has no such option; bench.step uses it to
        measure a frozen twin alone.
    """

    def __init__(
        self,
        model: nn.Module,
        class_counts: list[int],
        attack: AttackConfig,
        *,
        teacher: nn.Module | None = None,
        alpha: float = 20.0,
        lr: float = 0.1,
        compiled: bool = False,
        attacked: nn.Module | None = None,
    ):
        def maybe_compiled(function):
            return torch.compile(function) if compiled else function

        self.model, self.net = model, maybe_compiled(model)
        self.attacked = attacked or self.net
        self.teacher = teacher and maybe_compiled(teacher.eval())
        self.balanced_softmax = maybe_compiled(balanced_softmax)
        self.gradient_matching = maybe_compiled(gradient_matching)
        self.class_counts, self.attack, self.alpha = class_counts, attack, alpha
        self.optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)

    def __call__(self, x: Tensor, y: Tensor, progress: float = 1.0, start: Tensor | None = None) -> Tensor:
        """Train on one batch and return the loss.

        x: float32 images ``(B, C, H, W)`` in [0, 1]. y: int64 labels ``(B,)``. progress: epoch / epochs. start: start
        images of the attack; noise if None.
        """
        self.model.eval()
        x_adv = perturb(self.attacked, x, y, self.attack, start)
        self.model.train()

        self.optimizer.zero_grad()
        logits = self.net(x_adv)
        loss = self.balanced_softmax(logits, y, self.class_counts)
        if self.teacher is not None:
            delta = x_adv - x
            mirrored = x - delta
            with torch.no_grad():
                teacher_logits, teacher_mirrored = self.teacher(x_adv), self.teacher(mirrored)
            matching = self.gradient_matching(logits, self.net(mirrored), teacher_logits, teacher_mirrored)
            loss = loss + self.alpha * progress * matching
        loss.backward()
        self.optimizer.step()
        return loss.detach()
