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

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ltat_fast.attacks.apgd import APGD
from ltat_fast.attacks.balls import Ball, Norm
from ltat_fast.attacks.fab import FAB
from ltat_fast.attacks.network import Network, Precision
from ltat_fast.attacks.search import Batch, Rows, Search, State, margins
from ltat_fast.attacks.square import Square
from ltat_fast.pixels import to_unit

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
TARGETS = 9
SAVE_SECONDS = 20.0
BORDERLINE = 0.1


@dataclass(frozen=True)
class Progress:
    """part: the attack that runs. share: the part of the whole work that is done, from 0 to 1, an estimate. images: all
    attacked images. robust: those that are not broken so far.
    """

    part: str
    share: float
    images: int
    robust: int


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
    images: Tensor,
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
    network = Network(model, images.device, precision)
    indices = torch.arange(len(images)) if indices is None else indices
    evaluation = _Evaluation(network, images, labels, indices, Ball(norm, eps), tuple(parts), seed, batch_size)
    if keep_adversarial:
        evaluation.keep_adversarial()
    evaluation.run(store, on_progress)
    return Verdict(evaluation.robust.clone(), evaluation.adversarial)


class _Stage(NamedTuple):
    """One attack on all images that are left. rank: the target is the class with the rank-th largest logit, from 1 for
    the largest wrong one; 0 for an untargeted attack. precise: on the borderline images, in float32.
    """

    part: str
    rank: int
    precise: bool


class _Position(NamedTuple):
    """Number of the stage, of the batch of its queue, and of the next step."""

    stage: int = 0
    batch: int = 0
    step: int = 0


@dataclass
class _Attacked(Rows):
    """place: int64 ``(N,)``, the position of each image of a batch among all images. scale: the range of its logits."""

    place: Tensor
    scale: Tensor


class _Evaluation:
    """The state of an evaluation: which images are broken, which attack is at which step on which batch.

    robust: bool ``(N,)``. lowest: ``(N,)``, the lowest margin that an attack has reached, as a share of the range of
    the logits of the image. ranking: int64 ``(N, 1 + targets)``, the classes in the order of their logits. scale:
    ``(N,)``, the range of the logits. queue: the images of the current stage. All are on the CPU.
    """

    def __init__(
        self,
        network: Network,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        ball: Ball,
        parts: tuple[str, ...],
        seed: int,
        batch_size: int,
    ):
        self.network, self.images, self.labels, self.indices = network, images, labels, indices
        self.ball, self.parts, self.seed, self.batch_size = ball, parts, seed, batch_size
        self.attacks: dict[str, Search] = {
            "apgd-ce": APGD(ball, "ce"),
            "apgd-t": APGD(ball, "dlr-targeted"),
            "fab-t": FAB(ball),
            "square": Square(ball),
        }
        self.adversarial: Tensor | None = None
        self.position = _Position()
        self.state: State | None = None
        self.attacked: _Attacked | None = None

    def keep_adversarial(self) -> None:
        self.adversarial = torch.stack([to_float(image) for image in self.images]) if len(self.images) else None

    def run(self, store: Store | None, on_progress: Callable[[Progress], None]) -> None:
        saved = store.load() if store else None
        if saved:
            self._restore(*saved)
        else:
            self._look()
        last_save = time.monotonic()
        for progress in self._steps():
            on_progress(progress)
            if store and time.monotonic() - last_save > SAVE_SECONDS:
                store.save(*self._saved())
                last_save = time.monotonic()

    def _look(self) -> None:
        """Classify the images."""
        robust, ranking, scale = [], [], []
        for places in torch.arange(len(self.images)).split(self.batch_size):
            logits = self.network.logits(to_float(self.images[places.to(self.images.device)])).cpu()
            robust.append(logits.argmax(1) == self.labels[places.to(self.labels.device)].cpu())
            ranking.append(logits.argsort(1, descending=True)[:, : 1 + TARGETS])
            scale.append(logits.amax(1) - logits.amin(1))
        self.robust, self.ranking, self.scale = (torch.cat(parts) for parts in (robust, ranking, scale))
        self.lowest = torch.full((len(self.images),), torch.inf)
        self.queue = self._queue(0)

    def _stages(self) -> list[_Stage]:
        targets = self.ranking.shape[1] - 1
        ranks = {"apgd-t": range(1, 1 + targets) if targets >= 3 else (), "fab-t": range(1, 1 + targets)}
        passes = (False,) if self.network.is_exact else (False, True)
        return [_Stage(part, rank, again) for again in passes for part in self.parts for rank in ranks.get(part, (0,))]

    def _queue(self, number: int) -> Tensor:
        """Return the places of the images that stage ``number`` attacks."""
        stages = self._stages()
        left = self.robust.clone()
        if number < len(stages) and stages[number].precise:
            left &= self.lowest < BORDERLINE
        return left.nonzero().squeeze(1)

    def _steps(self) -> Iterator[Progress]:
        """Run the attacks from :attr:`position` on; yield after every step, when the state can be saved."""
        stages = self._stages()
        while self.position.stage < len(stages):
            stage = stages[self.position.stage]
            attack = self.attacks[stage.part]
            network = self.network.precise if stage.precise else self.network.search
            every = 20 if stage.part == "square" else 4
            stream = (self.seed, stage.part, stage.rank)
            batches = self.queue.split(self.batch_size)
            while self.position.batch < len(batches) and len(self.queue):
                if self.state is None:
                    places = batches[self.position.batch]
                    batch = self._batch(places, stage.rank)
                    with torch.no_grad():
                        self.state = attack.start(network, batch, stream)
                    self.attacked = _Attacked(places, self.scale[places])
                while self.position.step < attack.steps and len(self.state.x):
                    i = self.position.step
                    with torch.no_grad():
                        attack.step(network, self.state, i, stream)
                    if (i + 1) % every == 0 or i + 1 == attack.steps:
                        self._retire(stage.precise)
                    self.position = self.position._replace(step=i + 1)
                    yield self._progress(stages)
                self.state = self.attacked = None
                self.position = self.position._replace(batch=self.position.batch + 1, step=0)
            self.position = _Position(stage=self.position.stage + 1)
            self.queue = self._queue(self.position.stage)

    def _batch(self, places: Tensor, rank: int) -> Batch:
        here = places.to(self.images.device)
        x, y = to_float(self.images[here]), self.labels[here]
        return Batch(x, y, self.ranking[places, rank].to(x.device), self.indices[places])

    def _retire(self, precise: bool) -> None:
        """Remove the images from the batch that the network itself misclassifies at their closest point."""
        s, attacked = self.state, self.attacked
        assert s is not None and attacked is not None
        relative = s.margin.cpu() / attacked.scale
        self.lowest[attacked.place] = self.lowest[attacked.place].minimum(relative)
        tolerance = 1e-4 if precise else self.network.tolerance
        suspects = (relative <= tolerance).nonzero().squeeze(1)
        if len(suspects) == 0:
            return
        here = suspects.to(s.x.device)
        points, y = s.closest[here], s.y[here]
        broken = (self.network.logits(points).argmax(1) != y) & self._inside(points, s.x[here])
        s.forget(torch.zeros_like(s.y, dtype=torch.bool).index_fill_(0, here, True))
        broken = broken.cpu()
        if not broken.any():
            return
        gone = attacked.place[suspects[broken]]
        self.robust[gone] = False
        if self.adversarial is not None:
            self.adversarial[gone.to(self.adversarial.device)] = points[broken.to(points.device)]
        keep = torch.ones(len(attacked.place), dtype=torch.bool).index_fill_(0, suspects[broken], False)
        self.attacked, self.state = attacked.select(keep), s.select(keep.to(s.x.device))

    def _inside(self, points: Tensor, x: Tensor) -> Tensor:
        return self.ball.length(points - x).flatten() <= self.ball.eps + 1e-6

    def _progress(self, stages: list[_Stage]) -> Progress:
        stage = stages[self.position.stage]
        name = f"{stage.part} {stage.rank}" if stage.rank else stage.part
        return Progress(name, 0.0, len(self.images), int(self.robust.sum()))

    def _saved(self):
        raise NotImplementedError

    def _restore(self, tensors, position):
        raise NotImplementedError


def to_float(images: Tensor) -> Tensor:
    """Return images as float32 in [0, 1]."""
    return to_unit(images) if images.dtype == torch.uint8 else images.float()
