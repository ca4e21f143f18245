"""Targeted FAB: walk along the decision boundary to the adversarial example that is closest to the image.

Source: Croce, Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML 2020,
algorithm 1; the targeted form is from section 5 of the AutoAttack paper. Without random starts, as in AutoAttack.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ltat_fast.attacks.balls import Ball, per_image
from ltat_fast.attacks.noise import Stream
from ltat_fast.attacks.search import Batch, Logits, State, margins, with_gradient


@dataclass
class FABState(State):
    """point: x^(i), at the boundary."""

    target: Tensor
    point: Tensor


@dataclass(frozen=True)
class FAB:
    """FAB towards the class ``Batch.target``.

    alpha_max: largest weight of the step that starts at the image. eta: overshooting of the boundary. beta: the share
    of the way from the image that is left when the walk goes back from an adversarial example.
    """

    state: ClassVar[type] = FABState
    passes: ClassVar[int] = 3
    check_every: ClassVar[int] = 4

    ball: Ball
    steps: int = 100
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def start(self, network: Logits, batch: Batch, stream: Stream) -> FABState:
        far = torch.full_like(batch.x[:, 0, 0, 0], torch.inf)
        return FABState(x=batch.x, y=batch.y, margin=far, closest=batch.x, target=batch.target, point=batch.x)

    def step(self, network: Logits, state: FABState, i: int, stream: Stream) -> None:
        """Project the point and the image on the boundary between y and t, linearised at the point; mix both."""
        s, ball = state, self.ball

        def difference(logits: Tensor) -> Tensor:
            aimed, true = (logits.gather(1, classes[:, None]) for classes in (s.target, s.y))
            return (aimed - true).squeeze(1)

        _, at_point, w = with_gradient(network, s.point, difference)
        at_image = at_point + (w * (s.x - s.point)).flatten(1).sum(1)
        both = torch.cat([s.point, s.x]), torch.cat([w, w]), torch.cat([at_point, at_image])
        from_point, from_image = ball.step_to_plane(*both).chunk(2)
        near, far = (ball.length(d).clamp_min(1e-8) for d in (from_point, from_image))
        alpha = (near / (near + far)).clamp_max(self.alpha_max)
        mixed = (1 - alpha) * (s.point + self.eta * from_point) + alpha * (s.x + self.eta * from_image)
        s.point = mixed.clamp_(0, 1)
        with torch.no_grad():
            margin = margins(network(s.point), s.y)
        s.note(s.point, margin, allowed=ball.length(s.point - s.x).flatten() <= ball.eps)
        s.point = torch.where(per_image(margin < 0), s.x + self.beta * (s.point - s.x), s.point)
