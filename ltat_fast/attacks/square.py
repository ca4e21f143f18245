"""Square Attack: random search over square windows of the image, without gradients.

Source: Andriushchenko, Croce, Flammarion, Hein, "Square Attack: a query-efficient black-box adversarial attack via
random search", ECCV 2020, algorithms 1 to 3; the margin is the loss.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ltat_fast import seeding
from ltat_fast.attacks.balls import TINY, Ball
from ltat_fast.attacks.noise import Stream, image_noise, uniform
from ltat_fast.attacks.search import Batch, Logits, State, margins

# From this query on, the window holds p_init / divisor of the pixels (section 5 of the paper).
DIVISORS = {0: 1, 11: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
LARGEST_TABLE = 1 << 14
NUMBERS = 5  # random numbers of a query, besides one sign per channel


@dataclass
class SquareState(State):
    """best: the point of the lowest margin, ``best_margin``.

    rejected: bool ``(N, proposals)``, the proposals that did not improve ``best``, or ``(N, 0)``.
    """

    best: Tensor
    best_margin: Tensor
    rejected: Tensor


@dataclass(frozen=True)
class Square:
    """The Square Attack; ``steps`` is the number of queries after the first one.

    All images share the random numbers of a query (window, signs), as they share them within a batch of the original.

    A query is skipped if its answer is known: the proposal does not change the image, or it was rejected before at the
    same best point. With small windows on small images this holds for most queries.
    """

    state: ClassVar[type] = SquareState
    passes: ClassVar[int] = 1
    check_every: ClassVar[int] = 20

    ball: Ball
    steps: int = 5000
    p_init: float = 0.8

    def start(self, network: Logits, batch: Batch, stream: Stream) -> SquareState:
        """Query the first point: vertical stripes (L_inf) or a grid of windows (L2), with random signs."""
        x = batch.x
        noise = image_noise(batch.index, self._signs_at_start(x), x.device, uniform(-1, 1), *stream, "square").sign()
        if self.ball.norm == "linf":
            best = (x + self.ball.eps * noise).clamp_(0, 1)
        else:
            best = (x + self.ball.eps * self.ball.unit(_grid(noise, x))).clamp_(0, 1)
        margin = margins(network(best), batch.y)
        channels, height, width = x.shape[1:]
        proposals = height * width << channels
        size = proposals if self.ball.norm == "linf" and proposals <= LARGEST_TABLE else 0
        rejected = torch.zeros(len(x), size, dtype=torch.bool, device=x.device)
        return SquareState(x, batch.y, margin, best, best=best, best_margin=margin, rejected=rejected)

    def step(self, network: Logits, state: SquareState, i: int, stream: Stream) -> None:
        s = state
        channels, height, width = s.x.shape[1:]
        numbers, signs = (table[i] for table in _random_numbers(self.steps, channels, stream))
        side = self.side(i, height, width)
        if i > 0 and side != self.side(i - 1, height, width):
            s.rejected.zero_()
        windows = [
            (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
            for top, left in ((int(a * (height - side)), int(b * (width - side))) for a, b in numbers[:4].view(2, 2))
        ]
        if self.ball.norm == "linf":
            window = windows[0]
            patch = s.x[window] + self.ball.eps * signs.to(s.x).view(-1, 1, 1)
            patch.clamp_(0, 1)
            code = sum(1 << c for c, sign in enumerate(signs.tolist()) if sign > 0)
            proposal = (window[2].start * width + window[3].start << channels) + code
            rows = (patch != s.best[window]).flatten(1).any(1)
            if s.rejected.shape[1]:
                rows &= ~s.rejected[:, proposal]
            rows = rows.nonzero().squeeze(1)
            if len(rows) == 0:
                return
            points = s.best[rows]
            points[window] = patch[rows]
        else:
            rows = torch.arange(len(s.x), device=s.x.device)
            points = self._l2_points(s, windows, _pyramids(side, numbers[4] > 0.5), signs)
        margin = margins(network(points), s.y[rows])
        better = margin < s.best_margin[rows]
        if s.rejected.shape[1]:
            s.rejected[rows, proposal] = True
        improved = rows[better]
        s.best[improved], s.best_margin[improved] = points[better], margin[better]
        s.rejected[improved] = False
        s.closest = s.best
        s.margin[improved] = margin[better]

    def side(self, i: int, height: int, width: int) -> int:
        """Return the side of the window of query ``i``, in pixels."""
        divisor = next(divisor for first, divisor in reversed(DIVISORS.items()) if i >= first)
        side = round(math.sqrt(self.p_init / divisor * height * width))
        if self.ball.norm == "linf":
            side = max(side, 1)
        else:
            side = max(side, 3) | 1  # odd
        return min(side, height, width)

    def _signs_at_start(self, x: Tensor) -> tuple[int, ...]:
        channels, height, width = x.shape[1:]
        if self.ball.norm == "linf":
            return channels, 1, width
        side = height // 5
        return channels, height // side, width // side

    def _l2_points(self, s: SquareState, windows: list[tuple[slice, ...]], shape: Tensor, signs: Tensor) -> Tensor:
        """Return the proposals of algorithm 3: the budget of both windows moves to the first one."""
        d = s.best - s.x
        first, second = windows
        used = torch.zeros_like(d[:1, :1], dtype=torch.bool)
        used[first] = used[second] = True
        in_windows = (d * used).square().sum((2, 3), keepdim=True)
        unused = (self.ball.eps**2 - d.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / d.shape[1]
        here = d[first]
        patch = shape.to(d) * signs.to(d).view(-1, 1, 1) + here / (_channel_length(here) + TINY)
        patch = patch / (_channel_length(patch) + TINY) * (unused + in_windows).sqrt()
        d[second] = 0
        d[first] = patch
        return (s.x + self.ball.eps * self.ball.unit(d)).clamp_(0, 1)


@functools.lru_cache(maxsize=2)
def _random_numbers(steps: int, channels: int, stream: Stream) -> tuple[Tensor, Tensor]:
    """Return the random numbers of all queries, on the CPU: uniform in [0, 1) ``(steps, 5)``, signs ``(steps, C)``."""
    generator = seeding.stream("cpu", *stream, "square queries")
    numbers = torch.rand(steps, NUMBERS + channels, generator=generator)
    return numbers[:, :NUMBERS], torch.where(numbers[:, NUMBERS:] < 0.5, -1.0, 1.0)


def _channel_length(d: Tensor) -> Tensor:
    """Return the L2 norm of each channel, ``(N, C, 1, 1)``."""
    return d.square().sum((2, 3), keepdim=True).sqrt()


def _grid(signs: Tensor, x: Tensor) -> Tensor:
    """Fill ``x``'s shape with windows of side H // 5, each with two pyramids and its sign per channel."""
    side = x.shape[2] // 5
    d = torch.zeros_like(x)
    margin = (x.shape[2] - side * 5) // 2
    patches = signs[:, :, :, None, :, None] * _pyramids(side, False).to(x)[:, None, :]
    patches = patches.flatten(4, 5).flatten(2, 3)
    height, width = (min(a, b - margin) for a, b in zip(patches.shape[2:], x.shape[2:], strict=True))
    d[:, :, margin : margin + height, margin : margin + width] = patches[:, :, :height, :width]
    return d


@functools.cache
def _pyramids(side: int, transposed: bool) -> Tensor:
    """Return the window of algorithm 3, ``(side, side)`` of L2 norm 1: a pyramid and a negative one, side by side."""
    d = torch.cat([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
    d = d / d.norm()
    return d.T.contiguous() if transposed else d


def _pyramid(height: int, width: int) -> Tensor:
    """Return a pyramid of L2 norm 1, eq. (1) of the appendix: squares around the centre, of weights 1, 1/4, 1/9, ..."""
    d = torch.zeros(height, width)
    half_height, half_width = height // 2 + 1, width // 2 + 1
    for k in range(max(half_height, half_width)):
        top, left = half_height - 1 - k, half_width - 1 - k
        d[max(top, 0) : top + 2 * k + 1, max(left, 0) : left + 2 * k + 1] += 1 / (k + 1) ** 2
    return d / d.norm() if height else d
