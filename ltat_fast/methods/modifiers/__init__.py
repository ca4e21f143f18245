"""Modifiers: additions to the training step of any method. Each is one file here and None where it is off.

What changes per step is a function of the place in the run: the host computes it (:meth:`Modifiers.strengths`) and
fills it into device tensors (:meth:`Modifiers.fill`). So the only state is the averaged weights.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from ltat_fast.methods.base import Method
from ltat_fast.methods.modifiers.awp import WeightPerturbation, gamma_of
from ltat_fast.methods.modifiers.ema import WeightAverage
from ltat_fast.methods.modifiers.eps_balance import ClassBudget


@dataclass(frozen=True)
class Modifiers:
    """The modifiers of a stage. Each has its full strength until :meth:`fill` is called."""

    awp: WeightPerturbation | None = None
    ema: WeightAverage | None = None
    budget: ClassBudget | None = None

    def strengths(self, epoch: int, number: int, epochs: int, steps_per_epoch: int) -> dict[str, float]:
        """Return the arguments of :meth:`fill` for step ``number`` of ``epoch``, both from 0."""
        found = {}
        if self.awp:
            found["awp"] = self.awp.strength_in(epoch)
        if self.ema:
            found["ema"] = self.ema.decay_at(epoch * steps_per_epoch + number, epochs * steps_per_epoch)
        if self.budget:
            found["budget"] = self.budget.warm_up_in(epoch, epochs)
        return found

    def fill(self, awp: float | None = None, ema: float | None = None, budget: float | None = None) -> None:
        """Set the strength of each modifier that is on; None keeps it.

        awp: gamma of the perturbation. ema: decay d. budget: factor of the budgets.
        """
        if self.awp and awp is not None:
            self.awp.strength.fill_(awp)
        if self.ema and ema is not None:
            self.ema.weight.fill_(1 - ema)
        if self.budget and budget is not None:
            self.budget.warm_up.fill_(budget)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a step changes, by name: the averaged weights."""
        return dict(self.ema.model.named_parameters()) if self.ema else {}


OFF = Modifiers()


def build(
    method: Method,
    model: nn.Module,
    class_counts: Tensor,
    *,
    awp: float | None = None,
    awp_from: int = 1,
    ema: float = 0.0,
    eps_balance: float = 0.0,
    eps_warmup: float = 0.0,
) -> Modifiers:
    """Return the modifiers of a stage that trains ``model``, which is on its device, with ``method``.

    class_counts: int64 ``(C,)`` on that device, images per class of the stage. The other arguments are the settings of
    the same names; budgets stay off for a method without an attack.
    """
    gamma = gamma_of(method, awp)
    return Modifiers(
        WeightPerturbation(gamma, awp_from, class_counts.device) if gamma > 0 else None,
        WeightAverage(model, ema) if ema > 0 else None,
        ClassBudget(class_counts, eps_balance, eps_warmup) if eps_balance > 0 and method.uses_attack else None,
    )
