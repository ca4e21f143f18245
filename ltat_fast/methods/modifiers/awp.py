"""AWP: adversarial weight perturbation. For every weight tensor w_l with more than one dimension (convolutions and the
classifier):

    d_l = ||w_l|| g_l / ||g_l||,   g = gradient of L(w) on the batch
    w <- SGD(w + gamma d) - gamma d

L is the loss of the method on adversarial examples of the unperturbed weights.

Source: Wu, Xia, Wang, "Adversarial Weight Perturbation Helps Robust Generalization", NeurIPS 2020, eq. 8 and 10. Their
gamma is 0.01 from the first epoch with PGD-AT, and 0.005 from epoch 10 with TRADES.

As in the authors' code:
- Momentum and weight decay act at the perturbed weights, and the logged loss is the loss there.
- g is measured in train mode and leaves the statistics of batch norm unchanged. Their code takes g from a copy of the
  network, a proxy; the learning rate of the proxy cancels in d.

Departures:
- The attack runs in eval mode. Their PGD-AT code runs it in train mode, which updates batch norm.
- Inputs are not normalised. Their PGD-AT code normalises them.
- There is no extra train-mode forward for logging. Their PGD-AT code has one, which updates batch norm.
- Before the first active epoch the perturbation runs with gamma 0, so that a step captured as a CUDA graph stays valid.
  The weights are then those of the method alone, but each step costs as much as with AWP.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ltat_fast.methods.base import Method


def gamma_of(method: Method, awp: float | None) -> float:
    """Return the gamma of ``--awp``, or that of ``method`` if the flag is not given."""
    return method.default_awp if awp is None else awp


class WeightPerturbation:
    """Perturbs the weights during an update.

    gamma: size of the perturbation relative to the weights. first_epoch: first epoch, from 1, with a perturbation.
    strength: float32 scalar on ``device``, the gamma of the current step, which the host fills.
    """

    def __init__(self, gamma: float, first_epoch: int, device: torch.device):
        self.gamma, self.first_epoch = gamma, first_epoch
        self.strength = torch.tensor(gamma, dtype=torch.float32, device=device)

    def strength_in(self, epoch: int) -> float:
        """Return the gamma of ``epoch``, from 0."""
        return self.gamma if epoch + 1 >= self.first_epoch else 0.0

    @contextlib.contextmanager
    def perturbed(
        self, model: nn.Module, backward: Callable[[], object], state: Iterable[Tensor] = ()
    ) -> Iterator[None]:
        """Add gamma d to the weights of ``model`` for a ``with`` block, in which the optimizer changes the weights.

        backward: adds the gradient of the loss on the current batch to ``.grad`` of the weights. It must use
        ``backward()``, not ``autograd.grad``: DistributedDataParallel averages gradients over processes only there.
        state: tensors that it changes besides the buffers of ``model``; measuring g leaves them unchanged.
        """
        weights: list[Tensor] = [p for p in model.parameters() if p.ndim > 1]
        kept = [*model.buffers(), *state]
        kept_before = [tensor.clone() for tensor in kept]
        model.zero_grad(set_to_none=True)
        backward()
        with torch.no_grad():
            for tensor, before in zip(kept, kept_before, strict=True):
                tensor.copy_(before)
            original = [w.clone() for w in weights]
            norms = torch.stack(torch._foreach_norm(weights))
            grads = cast(list[Tensor], [w.grad for w in weights])  # none is missing
            sizes = self.strength * norms / (torch.stack(torch._foreach_norm(grads)) + 1e-20)
            perturbed = [w.addcmul(g, size) for w, g, size in zip(weights, grads, sizes.unbind(), strict=True)]
            torch._foreach_copy_(weights, perturbed)
        yield
        with torch.no_grad():
            # Add the optimizer's change to a copy of w. Subtracting gamma d would not restore w to the last bit.
            torch._foreach_sub_(weights, perturbed)
            torch._foreach_add_(weights, original)
