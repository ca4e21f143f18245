"""RUN/eval.json as typed objects: the result of each attack and the checks, by checkpoint (docs/evaluation.md)."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ltat_fast.attacks.balls import Norm
from ltat_fast.attacks.checks import Check
from ltat_fast.attacks.results import Result, unpack
from ltat_fast.files import write_json
from ltat_fast.runs.json_object import JsonObject, is_bool, is_count, is_number, is_percent, is_text, list_of, optional

CHECKPOINTS = ("best", "last")
CHECKS = "checks"  # the only key that is not the name of an attack
ALWAYS_GROUPS = ("head", "medium", "tail")  # groups of classes in every dataset; another numeric field is a group too
FIELDS = ("all", "per_class", "images", "correct", "chosen", "weights", "eps", "test_set")
FIELDS += ("norm", "not_finite", "attacks")


def read_result(entry: JsonObject) -> Result:
    """Read what :meth:`Result.to_json` wrote. Raises UserError if a field has a wrong type or is out of range."""
    images = entry.take("images", is_count, None)
    groups, other = {}, {}
    for name, value in entry.content.items():
        if name in ALWAYS_GROUPS or (name not in FIELDS and (value is None or is_number(value))):
            groups[name] = entry.take(name, optional(is_percent))
        elif name not in FIELDS:
            other[name] = value
    return Result(
        groups=groups,
        per_class=tuple(entry.take("per_class", list_of(optional(is_percent)), ())),
        images=images,
        correct=entry.take("correct", lambda bits: _holds(bits, images), None),
        chosen=entry.take("chosen", lambda bits: _selects(bits, images), None),
        weights=entry.take("weights", is_text, None),
        eps=entry.take("eps", is_text, None),
        test_set=entry.take("test_set", is_text, None),
        norm=entry.take("norm", lambda norm: norm in get_args(Norm), "linf"),
        not_finite=entry.take("not_finite", is_count, None),
        attacks=tuple(entry.take("attacks", list_of(is_text), ())),
        other=other,
        all=entry.take("all", optional(is_percent)),
    )


@dataclass(frozen=True)
class RecordedCheck(Check):
    """A check as stored in eval.json. weights: checksum of the weights that it examined."""

    weights: str | None = None

    @classmethod
    def from_json(cls, entry: JsonObject) -> "RecordedCheck":
        return cls(
            name=entry.take("name", is_text),
            passed=entry.take("passed", is_bool),
            value=entry.take("value", is_number),
            detail=entry.take("detail", is_text),
            weights=entry.take("weights", is_text, None),
        )

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass
class CheckpointResults:
    """What was measured on one checkpoint.

    entries: results by attack, and the checks under :data:`CHECKS`, in the order of the file.
    """

    entries: dict[str, Result | tuple[RecordedCheck, ...]] = field(default_factory=dict)

    @property
    def results(self) -> dict[str, Result]:
        return {name: entry for name, entry in self.entries.items() if name != CHECKS}

    @property
    def checks(self) -> tuple[RecordedCheck, ...]:
        return self.entries.get(CHECKS, ())

    @classmethod
    def from_json(cls, content: JsonObject) -> "CheckpointResults":
        entries = {}
        for name in content.content:
            if name == CHECKS:
                entries[name] = tuple(map(RecordedCheck.from_json, content.list_of_objects(name)))
            elif name.isprintable():
                entries[name] = read_result(content.object(name))
            else:
                raise content.damaged(f"{name!a:.40} is not the name of an attack")
        return cls(entries)

    def to_json(self) -> dict[str, Any]:
        return {
            name: [check.to_json() for check in self.checks] if name == CHECKS else entry.to_json()
            for name, entry in self.entries.items()
        }


@dataclass
class EvalFile:
    """The content of an eval.json."""

    checkpoints: dict[str, CheckpointResults] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "EvalFile":
        """Read ``path``. Raises UserError if it is missing or damaged."""
        return cls.from_json(JsonObject.load(path))

    @classmethod
    def load_or_empty(cls, path: Path) -> "EvalFile":
        """Read ``path`` like :meth:`load`, or return an empty file if it does not exist."""
        return cls.load(path) if path.exists() else cls()

    @classmethod
    def from_json(cls, content: JsonObject) -> "EvalFile":
        found = cls({which: CheckpointResults.from_json(part) for which, part in content.objects()})
        if len(lengths := {len(r.per_class) for r in found.every_result() if r.per_class}) > 1:
            numbers = " and ".join(map(str, sorted(lengths)))
            raise content.damaged(f"per_class has {numbers} numbers")
        return found

    def to_json(self) -> dict[str, Any]:
        return {which: part.to_json() for which, part in self.checkpoints.items()}

    def save(self, path: Path) -> None:
        write_json(path, self.to_json())

    def of(self, which: str) -> CheckpointResults:
        """What was measured on the checkpoint ``which``; empty if it was not evaluated."""
        return self.checkpoints.get(which, CheckpointResults())

    def result(self, which: str, attack: str) -> Result | None:
        """The result of ``attack`` on the checkpoint ``which``, if it was run."""
        return self.of(which).results.get(attack)

    @property
    def test_sets(self) -> set[str]:
        """The test sets of the results, as far as they were recorded. More than one is a mistake."""
        return {result.test_set for result in self.every_result() if result.test_set is not None}

    def every_result(self) -> list[Result]:
        return [result for part in self.checkpoints.values() for result in part.results.values()]

    def has_group(self, group: str) -> bool:
        """Whether any result has an accuracy for the ``group`` of classes."""
        return any(group in result.groups for result in self.every_result())


def percentages(files: Iterable[EvalFile], which: str, attack: str, group: str) -> list[float]:
    """Accuracy on one group of classes of one checkpoint under one attack, from each of the files that has it."""
    found = [file.result(which, attack) for file in files]
    percents = [result.percent(group) for result in found if result is not None]
    return [percent for percent in percents if percent is not None]


def _holds(bits: Any, images: int | None) -> bool:
    """Whether ``bits`` is a text of :func:`pack` for this number of images."""
    try:
        return images is not None and len(unpack(bits, images)) == images
    except (TypeError, ValueError):
        return False


def _selects(bits: Any, images: int | None) -> bool:
    """Whether ``bits`` is a text of :func:`pack` that selects this number of images."""
    try:
        return unpack(bits, 4 * len(bits)).sum() == images
    except (TypeError, ValueError):
        return False
