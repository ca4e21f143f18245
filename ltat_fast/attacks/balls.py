"""The L_inf and the L2 ball: lengths, projections and steepest steps, for attacks that work in either norm.

Tensors of images are float ``(N, C, H, W)``; a quantity per image is ``(N, 1, 1, 1)``, so that it broadcasts.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
TINY = 1e-12


@dataclass(frozen=True)
class Ball:
    """The images whose distance from an image is at most ``eps``, in units of pixels in [0, 1]."""

    norm: Norm
    eps: float

    def length(self, d: Tensor) -> Tensor:
        """Return the norm of each image of ``d``: max |d_i|, or sqrt(sum d_i^2)."""
        flat = d.flatten(1)
        length = flat.abs().amax(1) if self.norm == "linf" else flat.norm(dim=1)
        return per_image(length)

    def unit(self, d: Tensor) -> Tensor:
        """Scale each image of ``d`` to length 1."""
        return d / (self.length(d) + TINY)

    def steepest(self, grad: Tensor) -> Tensor:
        """Return the step of length 1 with the largest product with ``grad``: its sign, or its direction."""
        return grad.sign() if self.norm == "linf" else self.unit(grad)

    def project(self, x: Tensor, z: Tensor) -> Tensor:
        """Return ``z``, moved into the ball around ``x`` and then into [0, 1]."""
        if self.norm == "linf":
            return z.clamp(x - self.eps, x + self.eps).clamp_(0, 1)
        d = z - x
        length = self.length(d)
        return (x + d / (length + TINY) * length.clamp_max(self.eps)).clamp_(0, 1)

    def step_to_plane(self, x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
        """Return the shortest d for which x + d lies in [0, 1] and on the plane at which a linear function is zero.

        w: gradient of the function, shaped like ``x``. gap: value of the function at ``x``, ``(N,)``. If the plane does
        not meet [0, 1], d leads to the corner that is closest to it.

        Every pixel moves in the direction that closes the gap, at the same speed (L_inf) or at the speed |w_i| (L2), as
        far as its ``room`` in [0, 1] allows: |d_i| = min(t v_i, room_i). The gap that is closed at time t,
        sum_i |w_i| min(t v_i, room_i), is concave and piecewise linear in t, with a bend where a pixel arrives at its
        limit. FAB: Croce, Hein, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary Attack", ICML
        2020, eq. (3) and appendix A.
        """
        shape, x, w = x.shape, x.flatten(1), w.flatten(1)
        towards = -gap.sign()[:, None] * w.sign()
        slope = w.abs()
        speed = slope.sign() if self.norm == "linf" else slope
        room = torch.where(towards > 0, 1 - x, x)
        arrival, order = (room / speed).nan_to_num_(0, 0, 0).sort(1)  # a pixel with w = 0 contributes nothing
        closed_by_arrived = (slope * room).gather(1, order).cumsum(1)
        rate = (slope * speed).gather(1, order).flip(1).cumsum(1).flip(1)  # of the pixels that still move
        before = closed_by_arrived - (slope * room).gather(1, order)
        closed = before + rate * arrival
        bend = (closed < gap.abs()[:, None]).sum(1, keepdim=True)  # the first one at which the gap is closed
        reachable, bend = bend < x.shape[1], bend.clamp_max(x.shape[1] - 1)
        time = (gap.abs()[:, None] - before.gather(1, bend)) / rate.gather(1, bend)
        d = torch.where(reachable, torch.minimum(time * speed, room), room)
        return (towards * d).view(shape)


def per_image(values: Tensor) -> Tensor:
    """Return ``(N,)`` as ``(N, 1, 1, 1)``."""
    return values[:, None, None, None]
