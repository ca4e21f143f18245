"""AutoAttack, standard version: an image is robust if APGD-CE, targeted APGD, targeted FAB and Square all fail on it.

Source: Croce, Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks",
ICML 2020. The attacks, their order and their budgets are those of the paper, and an image is attacked until one of them
succeeds. What makes it cheaper than the package of the authors (:mod:`~ltat_fast.attacks.original`):

- The search runs on a frozen twin, in bfloat16 where the hardware has it. The network itself decides, in float32:
  every success is confirmed, and so is every failure that is close enough to a success to be a rounding error. Images
  whose margin became small without a success are attacked again, with all budgets, in float32.
- An image leaves its batch soon after it is broken; survivors of an attack are packed into full batches for the next.
- FAB takes one backward pass per step, and no gradient of the weights; Square skips queries whose answer it knows.

docs/evaluation.md says what each brings. All random numbers are functions of the seed and of the index of the image, so
that the batch size, the number of processes and interruptions do not change them.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from ltat_fast.attacks.apgd import APGD
from ltat_fast.attacks.balls import Ball, Norm
from ltat_fast.attacks.fab import FAB
from ltat_fast.attacks.network import Network, Precision
from ltat_fast.attacks.noise import Stream
from ltat_fast.attacks.search import Batch, Search, State
from ltat_fast.attacks.square import Square
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.pixels import to_unit

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
SAVE_SECONDS = 20.0
ROUNDING = 1e-6  # a distance may exceed eps by this
KEPT = ("robust", "lowest", "scale", "ranking", "queue")
COUNTED = ("stage", "step", "passes")

# Shares of the range of the logits of an image. The margins of a bfloat16 search differ from those in float32 by less
# than 0.02 for 99 % of the images, measured on ResNet-18 and on the network for digits.
TOLERANCE = {True: 1e-4, False: 0.02}
"""whether the search is in float32: up to which margin the network itself is asked"""
BORDERLINE = 0.04
"""up to which margin an image that survived a bfloat16 search is attacked again in float32"""


@dataclass(frozen=True)
class Progress:
    """part: the attack that runs. share: the part of the whole work that is done, from 0 to 1, an estimate. images: all
    attacked images. robust: those that are not broken so far.
    """

    part: str
    share: float
    images: int
    robust: int


class Images(Protocol):
    """Images, uint8 or float32 in [0, 1]. A tensor ``(N, C, H, W)`` is one. Others may load images when asked."""

    device: torch.device

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, places: Tensor, /) -> Tensor: ...


class Store(Protocol):
    """Keeps the state of an unfinished evaluation."""

    def save(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None: ...

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, or None if nothing was saved for the same evaluation."""
        ...


class Verdict(NamedTuple):
    """robust: bool ``(N,)`` on the CPU, the images that are classified correctly and that no attack broke. x_adv:
    float32 ``(N, C, H, W)``, the adversarial examples, and the images themselves where there is none; or None.
    """

    robust: Tensor
    x_adv: Tensor | None


def autoattack(
    model: nn.Module,
    images: Images,
    labels: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    parts: Sequence[str] = PARTS,
    seed: int = 0,
    batch_size: int = 256,
    indices: Tensor | None = None,
    precision: Precision = "auto",
    keep_adversarial: bool = False,
    store: Store | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Verdict:
    """Attack ``images`` with ``parts`` of AutoAttack.

    model: from images in [0, 1] to logits ``(N, K)``; attacked in eval mode. images: uint8, or float32 in [0, 1],
    ``(N, C, H, W)``. labels: int64 ``(N,)``. eps: radius of the ball, in units of pixels in [0, 1]. parts: names from
    :data:`PARTS`, in the order in which they run. indices: int64 ``(N,)`` on the CPU, the index of each image in its
    dataset, for its random numbers; ``arange(N)`` if None. precision: of the search; see :class:`Network`.
    keep_adversarial: also return the adversarial examples. store: where an unfinished evaluation is kept, and taken up
    again. on_progress: called after every step.

    The targeted attacks aim at the 9 wrong classes with the largest logits, or at all of them if there are fewer. The
    loss of the targeted APGD needs 4 classes; with fewer classes it is skipped.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a part of AutoAttack: choose from {', '.join(PARTS)}")
    if len(images) == 0:
        return Verdict(torch.empty(0, dtype=torch.bool), None)
    network = Network(model, images.device, math.prod(images.shape[2:]), precision)
    indices = torch.arange(len(images)) if indices is None else indices
    evaluation = _Evaluation(network, images, labels, indices, Ball(norm, eps), tuple(parts), seed, batch_size)
    saved = store.load() if store else None
    if saved:
        evaluation.restore(*saved)
    else:
        evaluation.classify(keep_adversarial)
    saved_at = time.monotonic()
    for _ in evaluation.steps():
        on_progress(evaluation.progress())
        if store and time.monotonic() - saved_at > SAVE_SECONDS:
            store.save(*evaluation.saved())
            saved_at = time.monotonic()
    return Verdict(evaluation.robust, evaluation.adversarial)


def searches(ball: Ball) -> dict[str, Search[Any]]:
    """Return the four parts with the budgets of the standard version."""
    return {
        "apgd-ce": APGD(ball, "ce"),
        "apgd-t": APGD(ball, "dlr-targeted"),
        "fab-t": FAB(ball),
        "square": Square(ball),
    }


class _Stage(NamedTuple):
    """One part, on all images that are left. precise: the search is in float32."""

    part: str
    precise: bool


class _Evaluation:
    """The state of an evaluation: which images are broken, which attack is at which step on which batch.

    All tensors are on the CPU, except those of ``state``. A row of a batch is an image and a target, given by its rank
    among the logits: 1 for the largest wrong one; 0 if the attack has no target.

    robust: bool ``(N,)``. lowest: ``(N,)``, the lowest margin that an attack has reached, as a share of ``scale``,
    ``(N,)``, the range of the logits of the image. ranking: int64 ``(N, 1 + targets)``, the classes in the order of
    their logits. queue: int64 ``(rows, 2)``, the places of the images and the ranks that wait in this stage. place and
    state: the images of the rows that are under attack, and the state of the attack on them; None between two batches.
    stage, step: number of the stage, and of the next step of this batch. passes: forward and backward passes so far.
    """

    robust: Tensor
    lowest: Tensor
    scale: Tensor
    ranking: Tensor
    queue: Tensor
    place: Tensor
    stages: list[_Stage]
    state: State | None = None
    adversarial: Tensor | None = None
    stage = step = passes = 0

    def __init__(
        self,
        network: Network,
        images: Images,
        labels: Tensor,
        indices: Tensor,
        ball: Ball,
        parts: tuple[str, ...],
        seed: int,
        batch_size: int,
    ):
        self.network, self.images, self.labels, self.indices = network, images, labels, indices
        self.ball, self.parts, self.seed, self.batch_size = ball, parts, seed, batch_size
        self.attacks = searches(ball)

    def classify(self, keep_adversarial: bool = False) -> None:
        """Classify the images; only those that are classified correctly are attacked."""
        robust, ranking, scale, pixels = [], [], [], []
        for places in torch.arange(len(self.images)).split(self.batch_size):
            x = self._pixels(places)
            logits = self.network.logits(x).cpu()
            robust.append((logits.argmax(1) == self._labels(places).cpu()) & logits.isfinite().all(1))
            ranking.append(logits.argsort(1, descending=True)[:, : 1 + TARGETS])
            scale.append((logits.amax(1) - logits.amin(1)).clamp_min(torch.finfo(logits.dtype).tiny))
            if keep_adversarial:
                pixels.append(x)
        self.robust, self.ranking, self.scale = (torch.cat(parts) for parts in (robust, ranking, scale))
        self.lowest = torch.full((len(self.images),), torch.inf)
        self.adversarial = torch.cat(pixels) if keep_adversarial else None
        self.stages = self._stages()
        self.queue = self._rows(0)

    def _stages(self) -> list[_Stage]:
        searches = (True,) if self.network.is_exact else (False, True)
        return [_Stage(part, precise) for precise in searches for part in self.parts if self._ranks(part)]

    def _ranks(self, part: str) -> range:
        """Return the ranks of the targets of ``part``; none if there are too few classes for it."""
        targets = self.ranking.shape[1] - 1
        if part == "apgd-t" and targets < 3:
            return range(0)
        return range(1, 1 + targets) if part in ("apgd-t", "fab-t") else range(1)

    def _rows(self, number: int) -> Tensor:
        """Return the rows of stage ``number``: all images with the first target, then with the second one, and so on.

        A batch seldom has two rows of an image while there are many images; while there are few, it has many such rows.
        """
        if number == len(self.stages):
            return torch.empty(0, 2, dtype=torch.int64)
        left = self.robust
        if self.stages[number].precise and not self.network.is_exact:
            left = left & (self.lowest < BORDERLINE)
        ranks, places = torch.tensor(self._ranks(self.stages[number].part)), left.nonzero().squeeze(1)
        return torch.stack([places.repeat(len(ranks)), ranks.repeat_interleave(len(places))], dim=1)

    @torch.no_grad()
    def steps(self) -> Iterator[None]:
        """Run the attacks from where they stand; yield after every step, when the state can be saved."""
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            attack, stream = self.attacks[stage.part], (self.seed, stage.part)
            network = self.network.precise if stage.precise else self.network.search
            while self.state is not None or self._next_batch(network, attack, stream):
                while self.step < attack.steps and len(self.place):
                    state = cast(State, self.state)  # without the images that were broken before
                    attack.step(network, state, self.step, stream)
                    self.step += 1
                    self.passes += attack.passes * len(self.place)
                    if self.step % attack.check_every == 0 or self.step == attack.steps:
                        self._retire(state, TOLERANCE[stage.precise])
                    yield
                self.state, self.step = None, 0
            self.stage += 1
            self.queue = self._rows(self.stage)

    def _next_batch(self, network: FrozenTwin, attack: Search[Any], stream: Stream) -> bool:
        """Start the attack on the next rows of the queue. Return whether there are any."""
        waiting = self.queue[self.robust[self.queue[:, 0]]]
        (self.place, rank), self.queue = waiting[: self.batch_size].unbind(1), waiting[self.batch_size :]
        if len(self.place) == 0:
            return False
        target = self.ranking[self.place, rank].to(self.labels.device)
        number = self.indices[self.place] + (rank << 32)  # another start for every target of an image
        self.state = attack.start(
            network, Batch(self._pixels(self.place), self._labels(self.place), target, number), stream
        )
        return True

    def _retire(self, s: State, tolerance: float) -> None:
        """Remove the images from the batch that the network itself misclassifies at their closest point."""
        relative = s.margin.cpu() / self.scale[self.place]
        self.lowest.scatter_reduce_(0, self.place, relative, "amin")
        suspects = (relative <= tolerance).nonzero().squeeze(1)
        if len(suspects) == 0:
            return
        rows = suspects.to(s.x.device)
        points = s.closest[rows]
        logits = self.network.logits(points)
        wrong = (logits.argmax(1) != s.y[rows]) | ~logits.isfinite().all(1)
        broken = wrong & (self.ball.length(points - s.x[rows]).flatten() <= self.ball.eps + ROUNDING)
        s.forget(torch.zeros_like(s.y, dtype=torch.bool).index_fill_(0, rows, True))
        gone = self.place[suspects[broken.cpu()]]
        if len(gone) == 0:
            return
        self.robust[gone] = False
        if self.adversarial is not None:
            self.adversarial[gone.to(points.device)] = points[broken]
        left = self.robust[self.place]  # without the other targets of the broken images
        self.place, self.state = self.place[left], s.select(left.to(s.x.device))

    def _pixels(self, places: Tensor) -> Tensor:
        images = self.images[places.to(self.images.device)]
        return to_unit(images) if images.dtype == torch.uint8 else images.float()

    def _labels(self, places: Tensor) -> Tensor:
        return self.labels[places.to(self.labels.device)]

    def progress(self) -> Progress:
        robust = int(self.robust.sum())
        stage = self.stages[self.stage]
        again = stage.precise and not self.network.is_exact

        def cost(part: str) -> int:
            return self.attacks[part].passes * self.attacks[part].steps

        attack = self.attacks[stage.part]
        ahead = len(self.place) * attack.passes * (attack.steps - self.step) + len(self.queue) * cost(stage.part)
        borderline = int((self.robust & (self.lowest < BORDERLINE)).sum())
        for part, precise in self.stages[self.stage + 1 :]:
            images = borderline if precise and not self.network.is_exact else robust
            ahead += images * len(self._ranks(part)) * cost(part)
        name = stage.part + ", again in float32" * again
        return Progress(name, self.passes / (self.passes + ahead), len(self.images), robust)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which :meth:`restore` continues."""
        tensors = {name: getattr(self, name) for name in KEPT}
        if self.adversarial is not None:
            tensors["adversarial"] = self.adversarial
        if self.state is not None:
            tensors |= {"place": self.place}
            tensors |= {f"state.{name}": tensor.clone() for name, tensor in self.state.tensors().items()}
        return tensors, {name: getattr(self, name) for name in COUNTED}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        device = self.labels.device
        for name in KEPT:
            setattr(self, name, tensors[name])
        for name in COUNTED:
            setattr(self, name, numbers[name])
        self.stages = self._stages()
        self.adversarial = tensors["adversarial"].to(device) if "adversarial" in tensors else None
        if "place" in tensors:
            self.place = tensors["place"]
            kind = self.attacks[self.stages[self.stage].part].state
            state = {name.removeprefix("state."): t.to(device) for name, t in tensors.items() if "." in name}
            self.state = kind(**state)
