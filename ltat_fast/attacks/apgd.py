"""Auto-PGD: projected gradient ascent with momentum that chooses its step size itself.

Source: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
ICML 2020, algorithm 1 and section 4.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ltat_fast.attacks.balls import TINY, Ball, per_image
from ltat_fast.attacks.noise import Stream, image_noise, normal, uniform
from ltat_fast.attacks.search import Batch, Logits, State, margins, with_gradient

MOMENTUM = 0.75  # alpha of algorithm 1
FIRST_PERIOD, PERIOD_DECREASE, SHORTEST_PERIOD = 0.22, 0.03, 0.06  # shares of all steps


@dataclass
class APGDState(State):
    """x_adv and previous: x^(k) and x^(k-1). loss and gradient: at x_adv. best, best_loss, best_gradient: the point of
    the largest loss so far. checkpoint_loss: best_loss at the last checkpoint. rises: number of steps since then that
    increased the loss. halved: whether that checkpoint halved the step size.
    """

    target: Tensor
    x_adv: Tensor
    previous: Tensor
    loss: Tensor
    gradient: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    step_size: Tensor
    checkpoint_loss: Tensor
    rises: Tensor
    halved: Tensor


@dataclass(frozen=True)
class APGD:
    """Auto-PGD on the cross-entropy ("ce") or on the targeted DLR loss ("dlr-targeted").

    ball: threat model. steps: number of gradient steps; one more gradient is taken at the start. rho: share of steps
    that must increase the loss between two checkpoints.
    """

    state: ClassVar[type] = APGDState
    passes: ClassVar[int] = 2
    check_every: ClassVar[int] = 4

    ball: Ball
    loss: Literal["ce", "dlr-targeted"]
    steps: int = 100
    rho: float = 0.75

    def start(self, network: Logits, batch: Batch, stream: Stream) -> APGDState:
        x, device = batch.x, batch.x.device
        draw = uniform(-1, 1) if self.ball.norm == "linf" else normal
        noise = image_noise(batch.index, x.shape[1:], device, draw, *stream, f"apgd-{self.loss}")
        x_adv = (x + self.ball.eps * self.ball.unit(noise)).clamp_(0, 1)
        none = x.new_zeros(len(x))
        state = APGDState(
            x=x,
            y=batch.y,
            margin=none + torch.inf,
            closest=x,
            target=batch.target,
            x_adv=x_adv,
            previous=x_adv,
            loss=none,
            gradient=x,
            best=x_adv,
            best_loss=none - torch.inf,
            best_gradient=x,
            step_size=none + 2 * self.ball.eps,
            checkpoint_loss=none,
            rises=none,
            halved=torch.ones_like(none, dtype=torch.bool),  # so that the first checkpoint does not test for progress
        )
        self._evaluate(network, state)
        # The original counts the first step as a rise if its loss is positive. A later count is not affected.
        state.loss, state.checkpoint_loss = none, state.best_loss
        return state

    def step(self, network: Logits, state: APGDState, i: int, stream: Stream) -> None:
        """x^(k+1) = P(x^(k) + a (P(x^(k) + step * direction) - x^(k)) + (1 - a) (x^(k) - x^(k-1)))."""
        s, ball = state, self.ball
        share = MOMENTUM if i > 0 else 1.0
        ascended = ball.project(s.x, s.x_adv + per_image(s.step_size) * ball.steepest(s.gradient))
        moved = s.x_adv + share * (ascended - s.x_adv) + (1 - share) * (s.x_adv - s.previous)
        s.previous, s.x_adv = s.x_adv, ball.project(s.x, moved)
        before = s.loss
        self._evaluate(network, s)
        s.rises = s.rises + (s.loss > before)
        if (period := checkpoints(self.steps).get(i)) is not None:
            self._halve_step_sizes(s, period)

    def _evaluate(self, network: Logits, s: APGDState) -> None:
        """Update the loss, the gradient and the best points for a new ``x_adv``."""
        logits, s.loss, s.gradient = with_gradient(network, s.x_adv, lambda logits: self.losses(logits, s.y, s.target))
        s.note(s.x_adv, margins(logits, s.y))
        higher = s.loss > s.best_loss
        s.best = torch.where(per_image(higher), s.x_adv, s.best)
        s.best_gradient = torch.where(per_image(higher), s.gradient, s.best_gradient)
        s.best_loss = torch.where(higher, s.loss, s.best_loss)

    def losses(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each image, ``(N,)``."""
        return F.cross_entropy(logits, y, reduction="none") if self.loss == "ce" else dlr_targeted(logits, y, target)

    def _halve_step_sizes(self, s: APGDState, period: int) -> None:
        """Halve the step size of an image, and restart it from its best point, if it makes no progress.

        Condition 1: less than rho of the steps since the last checkpoint increased the loss. Condition 2: neither the
        best loss nor the step size has changed since then.
        """
        oscillates = s.rises <= self.rho * period
        stuck = ~s.halved & (s.checkpoint_loss >= s.best_loss)
        halve = oscillates | stuck
        s.step_size = torch.where(halve, s.step_size / 2, s.step_size)
        s.x_adv = torch.where(per_image(halve), s.best, s.x_adv)
        s.gradient = torch.where(per_image(halve), s.best_gradient, s.gradient)
        s.halved, s.checkpoint_loss, s.rises = halve, s.best_loss, torch.zeros_like(s.rises)


@functools.cache
def checkpoints(steps: int) -> dict[int, int]:
    """Return the steps after which step sizes are checked, from 0, each with the number of steps since the last check.

    The periods are 22, 19, 16, ... percent of all steps, and never less than 6 percent.
    """
    period, shorter, shortest = (
        max(int(share * steps), 1) for share in (FIRST_PERIOD, PERIOD_DECREASE, SHORTEST_PERIOD)
    )
    found, done = {}, period
    while done <= steps:
        found[done - 1] = period
        period = max(period - shorter, shortest)
        done += period
    return found


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Return the targeted difference-of-logits ratio, eq. (7): -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), ``(N,)``.

    z_1 >= z_2 >= ... are the sorted logits. logits: ``(N, K)`` with K >= 4.
    """
    largest = logits.topk(4, dim=1).values
    scale = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2
    true, aimed = (logits.gather(1, classes[:, None]).squeeze(1) for classes in (y, target))
    return (aimed - true) / (scale + TINY)
