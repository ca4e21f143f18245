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
from ltat_fast.attacks.search import Batch, Search, State
from ltat_fast.attacks.square import Square
from ltat_fast.pixels import to_unit

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
SAVE_SECONDS = 20.0
ROUNDING = 1e-6  # a distance may exceed eps by this
KEPT = ("robust", "lowest", "scale", "ranking", "queue")

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
    def __getitem__(self, places: Tensor) -> Tensor: ...


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


class _Stage(NamedTuple):
    """One attack on all images that are left. rank: the target is the class with the rank-th largest logit, from 1 for
    the largest wrong one; 0 for an untargeted attack. precise: in float32.
    """

    part: str
    rank: int
    precise: bool


class _Position(NamedTuple):
    """Number of the stage, of the batch of its queue, and of the next step."""

    stage: int = 0
    batch: int = 0
    step: int = 0


class _Evaluation:
    """The state of an evaluation: which images are broken, which attack is at which step on which batch.

    All tensors are on the CPU, except those of ``state``.

    robust: bool ``(N,)``. lowest: ``(N,)``, the lowest margin that an attack has reached, as a share of ``scale``,
    ``(N,)``, the range of the logits of the image. ranking: int64 ``(N, 1 + targets)``, the classes in the order of
    their logits. queue: the images of the current stage. place and state: those of the current batch that are left,
    and the state of the attack on them; None between two batches. passes: forward and backward passes so far.
    """

    robust: Tensor
    lowest: Tensor
    scale: Tensor
    ranking: Tensor
    queue: Tensor
    place: Tensor
    state: State | None = None
    adversarial: Tensor | None = None
    position = _Position()
    passes = 0

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
        self.attacks: dict[str, Search[Any]] = {
            "apgd-ce": APGD(ball, "ce"),
            "apgd-t": APGD(ball, "dlr-targeted"),
            "fab-t": FAB(ball),
            "square": Square(ball),
        }

    def classify(self, keep_adversarial: bool = False) -> None:
        """Classify the images; only those that are classified correctly are attacked."""
        robust, ranking, scale, pixels = [], [], [], []
        for places in torch.arange(len(self.images)).split(self.batch_size):
            x = self._pixels(places)
            logits = self.network.logits(x).cpu()
            robust.append(logits.argmax(1) == self._labels(places).cpu())
            ranking.append(logits.argsort(1, descending=True)[:, : 1 + TARGETS])
            scale.append(logits.amax(1) - logits.amin(1))
            if keep_adversarial:
                pixels.append(x)
        self.robust, self.ranking, self.scale = (torch.cat(parts) for parts in (robust, ranking, scale))
        self.lowest = torch.full((len(self.images),), torch.inf)
        self.adversarial = torch.cat(pixels) if keep_adversarial else None
        self.stages = self._stages()
        self.queue = self._queue(0)

    def _stages(self) -> list[_Stage]:
        targets = self.ranking.shape[1] - 1
        ranks = {"apgd-t": range(1, 1 + targets) if targets >= 3 else (), "fab-t": range(1, 1 + targets)}
        searches = (True,) if self.network.is_exact else (False, True)
        return [
            _Stage(part, rank, precise) for precise in searches for part in self.parts for rank in ranks.get(part, (0,))
        ]

    def _queue(self, number: int) -> Tensor:
        """Return the places of the images that stage ``number`` attacks."""
        left = self.robust
        if number < len(self.stages) and self.stages[number].precise and not self.network.is_exact:
            left = left & (self.lowest < BORDERLINE)
        return left.nonzero().squeeze(1)

    def steps(self) -> Iterator[None]:
        """Run the attacks from :attr:`position` on; yield after every step, when the state can be saved."""
        while self.position.stage < len(self.stages):
            stage = self.stages[self.position.stage]
            batches = self.queue.split(self.batch_size) if len(self.queue) else ()
            while self.position.batch < len(batches):
                yield from self._attack(stage, batches[self.position.batch])
                self.state = None
                self.position = _Position(self.position.stage, self.position.batch + 1)
            self.position = _Position(self.position.stage + 1)
            self.queue = self._queue(self.position.stage)

    @torch.no_grad()
    def _attack(self, stage: _Stage, places: Tensor) -> Iterator[None]:
        """Take the steps of a stage on a batch, from :attr:`position` on."""
        attack, stream = self.attacks[stage.part], (self.seed, stage.part, stage.rank)
        network = self.network.precise if stage.precise else self.network.search
        if self.state is None:
            target = self.ranking[places, stage.rank].to(self.labels.device)
            batch = Batch(self._pixels(places), self._labels(places), target, self.indices[places])
            self.place, self.state = places, attack.start(network, batch, stream)
        for i in range(self.position.step, attack.steps):
            if len(self.place) == 0:
                break
            state = cast(State, self.state)  # without the images that were broken before
            attack.step(network, state, i, stream)
            self.passes += attack.passes * len(self.place)
            if (i + 1) % attack.check_every == 0 or i + 1 == attack.steps:
                self._retire(state, TOLERANCE[stage.precise])
            self.position = self.position._replace(step=i + 1)
            yield

    def _retire(self, s: State, tolerance: float) -> None:
        """Remove the images from the batch that the network itself misclassifies at their closest point."""
        relative = s.margin.cpu() / self.scale[self.place]
        self.lowest[self.place] = self.lowest[self.place].minimum(relative)
        suspects = (relative <= tolerance).nonzero().squeeze(1)
        if len(suspects) == 0:
            return
        rows = suspects.to(s.x.device)
        points = s.closest[rows]
        wrong = self.network.logits(points).argmax(1) != s.y[rows]
        broken = wrong & (self.ball.length(points - s.x[rows]).flatten() <= self.ball.eps + ROUNDING)
        s.forget(torch.zeros_like(s.y, dtype=torch.bool).index_fill_(0, rows, True))
        gone = suspects[broken.cpu()]
        if len(gone) == 0:
            return
        self.robust[self.place[gone]] = False
        if self.adversarial is not None:
            self.adversarial[self.place[gone].to(points.device)] = points[broken]
        left = torch.ones(len(self.place), dtype=torch.bool).index_fill_(0, gone, False)
        self.place, self.state = self.place[left], s.select(left.to(s.x.device))

    def _pixels(self, places: Tensor) -> Tensor:
        images = self.images[places.to(self.images.device)]
        return to_unit(images) if images.dtype == torch.uint8 else images.float()

    def _labels(self, places: Tensor) -> Tensor:
        return self.labels[places.to(self.labels.device)]

    def progress(self) -> Progress:
        robust = int(self.robust.sum())
        stage = self.stages[self.position.stage]
        part = stage.part + f", target {stage.rank}" * (stage.rank > 0)
        if stage.precise and not self.network.is_exact:
            part += ", again in float32"
        costs = [self.attacks[later.part].passes * self.attacks[later.part].steps for later in self.stages]
        attack = self.attacks[stage.part]
        waiting = max(0, len(self.queue) - (self.position.batch + 1) * self.batch_size)
        ahead = len(self.place) * attack.passes * (attack.steps - self.position.step)
        ahead += waiting * costs[self.position.stage]
        first = not stage.precise or self.network.is_exact
        images = robust if first else len(self.queue)
        later = range(self.position.stage + 1, len(costs))
        ahead += images * sum(costs[i] for i in later if self.stages[i].precise == stage.precise)
        return Progress(part, self.passes / (self.passes + ahead), len(self.images), robust)

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers from which :meth:`restore` continues."""
        tensors = {name: getattr(self, name) for name in KEPT}
        if self.adversarial is not None:
            tensors["adversarial"] = self.adversarial
        if self.state is not None:
            tensors |= {"place": self.place}
            tensors |= {f"state.{name}": tensor for name, tensor in self.state.tensors().items()}
        return tensors, {"position": list(self.position), "passes": self.passes}

    def restore(self, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
        device = self.labels.device
        for name in KEPT:
            setattr(self, name, tensors[name])
        self.stages = self._stages()
        self.position, self.passes = _Position(*numbers["position"]), numbers["passes"]
        self.adversarial = tensors["adversarial"].to(device) if "adversarial" in tensors else None
        if "place" in tensors:
            self.place = tensors["place"]
            kind = self.attacks[self.stages[self.position.stage].part].state
            state = {name.removeprefix("state."): t.to(device) for name, t in tensors.items() if "." in name}
            self.state = kind(**state)
