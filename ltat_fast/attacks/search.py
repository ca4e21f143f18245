"""What APGD, FAB and Square have in common: a batch under attack, its state between steps, and the network."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from ltat_fast.attacks.noise import Stream

Logits = Callable[[Tensor], Tensor]
R = TypeVar("R", bound="Rows")
S = TypeVar("S", bound="State")


@dataclass
class Rows:
    """Tensors with one row per image. Derived classes add fields; all of them are such tensors."""

    def select(self: R, rows: Tensor) -> R:
        """Return the ``rows``, an index or a mask ``(N,)``."""
        return type(self)(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass
class Batch(Rows):
    """Images under attack.

    x: float32 ``(N, C, H, W)`` in [0, 1]. y: int64 labels ``(N,)``. target: int64 ``(N,)``, the class that a targeted
    attack aims at. index: int64 ``(N,)`` on the CPU, index of each image in its dataset, for its random numbers.
    """

    x: Tensor
    y: Tensor
    target: Tensor
    index: Tensor


@dataclass
class State(Rows):
    """Where an attack on a batch stands.

    margin: ``(N,)``, the lowest margin of a point that the attack has tried since :meth:`forget`. closest: that point.
    Only points of the ball count. A negative margin means that the network misclassifies the point.
    """

    x: Tensor
    y: Tensor
    margin: Tensor
    closest: Tensor

    def note(self, points: Tensor, margin: Tensor, allowed: Tensor | None = None) -> None:
        """Remember the points with lower margins. allowed: bool ``(N,)``, the points that are in the ball."""
        lower = margin < self.margin
        if allowed is not None:
            lower &= allowed
        self.margin = torch.where(lower, margin, self.margin)
        self.closest = torch.where(lower[:, None, None, None], points, self.closest)

    def forget(self, rows: Tensor) -> None:
        """Start the search for the lowest margin again. rows: bool ``(N,)``."""
        self.margin = self.margin.masked_fill(rows, torch.inf)


class Search(Protocol[S]):
    """An attack that takes ``steps`` steps on a batch. No image of the batch influences another one.

    stream: begins the names of all random streams of the attack.
    """

    state: ClassVar[type]
    """class of its state, derived from :class:`State`"""
    passes: ClassVar[int]
    """cost of a step: forward and backward passes"""
    check_every: ClassVar[int]
    """number of steps after which successes are confirmed"""

    @property
    def steps(self) -> int: ...

    def start(self, network: Logits, batch: Batch, stream: Stream) -> S: ...

    def step(self, network: Logits, state: S, i: int, stream: Stream) -> None:
        """Take step ``i``, from 0, and change ``state``. ``state`` may have lost rows since step ``i - 1``."""
        ...


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """Return the true logit minus the largest wrong logit, ``(N,)``. logits: ``(N, K)``. y: int64 ``(N,)``.

    It is -inf where the logits are not finite, so that the network itself is asked about such a point.
    """
    true = logits.gather(1, y[:, None])
    margin = true - logits.scatter(1, y[:, None], -torch.inf).amax(1, keepdim=True)
    return torch.where(margin.isfinite(), margin, -torch.inf).squeeze(1)


def with_gradient(network: Logits, x: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits ``(N, K)``, ``value(logits)`` ``(N,)`` and the gradient of each value with respect to its image."""
    point = x.detach().requires_grad_()
    with torch.enable_grad():
        logits = network(point)
        values = value(logits)
        (gradient,) = torch.autograd.grad(values.sum(), point)
    return logits.detach(), values.detach(), gradient
