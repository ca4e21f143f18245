"""The result of an attack on a network: accuracies, and which images were classified correctly."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from ltat_fast.attacks.balls import Norm

BALANCED = "balanced"  # the "group" of the balanced accuracy
_STORED = ("images", "correct", "chosen", "weights", "eps", "test_set", "norm", "not_finite")


def pack(bits: np.ndarray) -> str:
    """Write bools ``(N,)`` as hexadecimal digits, 4 bools per digit, the first one in the highest bit."""
    return np.packbits(bits).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """Return the ``count`` bools that :func:`pack` wrote as ``text``. Raises ValueError if the length does not fit."""
    packed = np.frombuffer(bytes.fromhex(text), np.uint8)
    if len(packed) != (count + 7) // 8:
        raise ValueError(f"{len(packed)} bytes do not hold {count} bits")
    return np.unpackbits(packed, count=count).astype(bool)


def is_balanced(labels: np.ndarray) -> bool:
    """Whether every class of ``labels`` has the same number of images.

    A difference of one does not count: ``--limit-eval`` cannot take the same number of images from every class.
    """
    counts = np.unique(labels, return_counts=True)[1]
    return len(counts) == 0 or counts.max() - counts.min() <= 1


@dataclass(frozen=True)
class Identity:
    """What a result depends on besides the attack: checksum of the weights, ball, fingerprint of the test set."""

    weights: str
    eps: str
    test_set: str
    norm: Norm = "linf"


@dataclass(frozen=True)
class Result:
    """Accuracy of one set of weights under one attack.

    all, groups and per_class are the percentages of images still classified correctly: of all images, of each group of
    classes and of each class; None where there is no image. If the classes have different numbers of images, the group
    :data:`BALANCED` is the mean of per_class. Results of earlier versions lack some of the other fields.
    """

    all: float | None
    groups: dict[str, float | None] = field(default_factory=dict)
    per_class: tuple[float | None, ...] = ()
    images: int | None = None
    """number of attacked images"""
    correct: str | None = None
    """which attacked images were classified correctly, written by :func:`pack`"""
    chosen: str | None = None
    """which images of the test set were attacked, written by :func:`pack`; None for all of them"""
    weights: str | None = None
    eps: str | None = None
    test_set: str | None = None
    norm: Norm = "linf"
    not_finite: int | None = None
    """number of attacked images whose logits were not finite, which are never correct; None for 0"""
    attacks: tuple[str, ...] = ()
    """the attacks that a worst case combines"""
    other: dict[str, Any] = field(default_factory=dict)
    """fields that this version does not know, kept when the file is written again"""

    @classmethod
    def from_correct(
        cls,
        correct: Tensor,
        labels: Tensor,
        groups: dict[str, list[int]],
        num_classes: int,
        chosen: np.ndarray | None = None,
        not_finite: int = 0,
    ) -> "Result":
        """Compute the result of an attack.

        correct: bool ``(N,)`` and labels: int64 ``(N,)``, of the attacked images. chosen: which images of the test set
        were attacked, bool; None for all of them. not_finite: number of images whose logits were not finite.
        """
        hits, classes_of = correct.cpu().numpy(), labels.cpu().numpy()

        def percent(among: np.ndarray) -> float | None:
            return float(100 * hits[among].mean()) if among.any() else None

        per_class = tuple(percent(classes_of == c) for c in range(num_classes))
        by_group = {name: percent(np.isin(classes_of, classes)) for name, classes in groups.items()}
        if not is_balanced(classes_of):
            by_group[BALANCED] = float(np.mean([accuracy for accuracy in per_class if accuracy is not None]))
        return cls(
            all=percent(np.ones_like(hits)),
            groups=by_group,
            per_class=per_class,
            images=len(hits),
            correct=pack(hits),
            chosen=None if chosen is None else pack(chosen),
            not_finite=not_finite or None,
        )

    def to_json(self) -> dict[str, Any]:
        content = {"attacks": list(self.attacks)} if self.attacks else {}
        content |= {"all": self.all, **self.groups}
        content |= {"per_class": list(self.per_class)} if self.per_class else {}
        rest = {name: getattr(self, name) for name in _STORED}
        rest["norm"] = None if self.norm == "linf" else self.norm
        return content | {name: value for name, value in rest.items() if value is not None} | self.other

    def percent(self, group: str) -> float | None:
        """Accuracy of "all" or of a group of classes; None if it was not measured."""
        return self.all if group == "all" else self.groups.get(group)

    def of(self, identity: Identity) -> "Result":
        """Return this result with the weights, ball and test set of ``identity``."""
        return dataclasses.replace(self, **dataclasses.asdict(identity))

    def is_of(self, identity: Identity) -> bool:
        own = (self.weights, self.eps, self.test_set, self.norm)
        return own == (identity.weights, identity.eps, identity.test_set, identity.norm)

    def attacked(self, count: int) -> np.ndarray:
        """Which of the ``count`` images of the test set were attacked: bool ``(count,)``."""
        return np.ones(count, bool) if self.chosen is None else unpack(self.chosen, count)
