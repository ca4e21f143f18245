"""What a training method is: hyper-parameters, what the attack ascends, what the student descends.

A method is a dataclass. Its fields are its hyper-parameters and become command-line flags; :data:`ltat_fast.methods.
METHODS` lists the classes. The engine owns everything else: data, attack loop, frozen twin, precision, compilation.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.errors import UserError

Model = Callable[[Tensor], Tensor]
LossOf = Callable[[], tuple[Tensor, dict]]


@dataclass
class MethodContext:
    """What a method may know of the run it is in, handed to :meth:`Method.setup`.

    class_counts: int64 ``(C,)`` on the training device, training images of each class.
    teacher: frozen, images to float32 logits; None where the method asks for none.
    """

    class_counts: Tensor
    teacher: Model | None = None


@dataclass
class Method:
    """Base of all methods; as it stands, the attack ascends cross-entropy with hard labels."""

    name: ClassVar[str]
    noise: ClassVar[Literal["uniform", "gaussian"]] = "uniform"
    teacher: ClassVar[Literal["none", "balanced", "robust", "natural"]] = "none"
    """trained by the run unless one is given: PGD-AT on the balanced re-sampling, PGD-AT on all of the data, or
    standard training on all of it"""
    needs_fp32_attack: ClassVar[bool] = False
    """The attack starts where its objective is all but flat: in bfloat16 the sign of that gradient is half noise, so
    the attack runs in float32 unless the user says otherwise"""
    uses_attack: ClassVar[bool] = True
    """False: ``x_adv`` is ``x``"""
    needs_double_backward: ClassVar[bool] = False
    """The loss holds a gradient of the student's. Neither torch.compile nor synchronised batch norm can differentiate
    that, so the student is not compiled, and more than one process is refused."""

    def check(self) -> None:
        """Refuse hyper-parameters that cannot work: here, numbers that are negative or not finite.

        Raises UserError.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"--{field.name.replace('_', '-')} must be 0 or more, not {value:g}")

    def setup(self, context: MethodContext) -> None:
        """Called once before training starts."""
        self.context = context

    def wrap_model(self, model: nn.Module, class_counts: Tensor) -> nn.Module:
        """The network this method trains and exports, from a plain one; called before any weight is trained or loaded.

        class_counts: int64 ``(C,)`` on the CPU.
        """
        return model

    def on_epoch_start(self, epoch: int) -> None:
        """Called before the steps of ``epoch``, counted from 0; not when an interrupted epoch goes on."""

    def state(self) -> dict[str, Tensor]:
        """Tensors the method itself changes while training: saved with the run and, on resume, copied back into."""
        return {}

    def target(self, frozen: Model, x: Tensor, y: Tensor) -> Tensor:
        """What :meth:`objective` compares with, computed once a batch: labels here, clean predictions for TRADES."""
        return y

    def objective(self, x_adv: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        """What the attack ascends: a scalar, summed over the batch."""
        return F.cross_entropy(logits, target, reduction="sum")

    def loss(self, model: Model, x: Tensor, x_adv: Tensor, y: Tensor, progress: Tensor) -> tuple[Tensor, dict]:
        """What the student descends.

        model: the student in train mode. x, x_adv: ``(B, C, H, W)`` in [0, 1]. y: int64 ``(B,)``.
        progress: 0-dim, epoch / epochs with the epoch counted from 1.
        Returns the scalar loss and its named parts, detached 0-dim tensors, to be averaged over the epoch and logged.
        """
        raise NotImplementedError

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer, loss: LossOf) -> tuple[Tensor, dict]:
        """One update of the weights of ``model``: ``loss()`` is :meth:`loss` on the batch at hand, in its precision.

        Returns what ``loss()`` returned at the weights before the update. No synchronisation with the device.
        """
        optimizer.zero_grad(set_to_none=True)
        value, parts = loss()
        value.backward()
        optimizer.step()
        return value.detach(), parts
