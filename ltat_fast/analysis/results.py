"""RUN/analysis.json as typed objects: the numbers of each part of the analysis, by checkpoint (docs/analysis.md)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltat_fast.analysis.table import ROWS
from ltat_fast.files import write_json
from ltat_fast.runs.json_object import JsonObject, is_count, is_list, is_number, list_of, optional

IDENTITY = ("weights", "eps", "test_set", "teacher", "compared")


@dataclass(frozen=True)
class Part:
    """One part of the analysis of one checkpoint.

    numbers: nested dicts of means. A mean is a dict with "all" and the groups of classes; None where there is no image.
    images: number of test images. identity: everything else that the numbers depend on, by the names of
    :data:`IDENTITY`.
    """

    numbers: dict[str, Any]
    images: int | None
    identity: dict[str, Any]

    @classmethod
    def from_json(cls, name: str, content: JsonObject) -> "Part":
        """Read what :meth:`to_json` wrote. Raises UserError if a place that the table shows does not hold a number."""
        images = content.take("images", is_count, None)
        for _, place in ROWS:
            part, *names = place.split("/")
            if part == name:
                _check_shown(content, names)
        fields = content.content
        return cls(
            {key: value for key, value in fields.items() if key != "images" and key not in IDENTITY},
            images,
            {key: value for key, value in fields.items() if key in IDENTITY},
        )

    def to_json(self) -> dict[str, Any]:
        return self.numbers | ({} if self.images is None else {"images": self.images}) | self.identity

    def is_of(self, identity: dict[str, Any], images: int) -> bool:
        """Whether the numbers belong to ``identity`` and were measured on at least this number of images."""
        return identity.items() <= self.identity.items() and self.images is not None and self.images >= images


@dataclass
class AnalysisFile:
    """The content of an analysis.json: parts by checkpoint and name."""

    checkpoints: dict[str, dict[str, Part]] = field(default_factory=dict)

    @classmethod
    def load_or_empty(cls, path: Path) -> "AnalysisFile":
        """Read ``path``, or return an empty file if it does not exist. Raises UserError if it is damaged."""
        if not path.exists():
            return cls()
        return cls(
            {
                which: {name: Part.from_json(name, part) for name, part in parts.objects()}
                for which, parts in JsonObject.load(path).objects()
            }
        )

    def save(self, path: Path) -> None:
        content = self.checkpoints.items()
        write_json(path, {which: {name: p.to_json() for name, p in parts.items()} for which, parts in content})

    def of(self, which: str) -> dict[str, Part]:
        """The parts of the checkpoint ``which``, by name."""
        return self.checkpoints.get(which, {})

    def numbers(self, which: str) -> dict[str, dict[str, Any]]:
        """The numbers of the parts of the checkpoint ``which``, by name."""
        return {name: part.numbers for name, part in self.of(which).items()}


def _check_shown(part: JsonObject, names: list[str]) -> None:
    """Raise UserError unless the value at the place ``names`` is missing, a mean, or a list of numbers."""
    *parents, last = names
    for name in parents:
        part = part.object(name)
    if is_list(part.content.get(last)):
        part.take(last, list_of(optional(is_number)))
    elif mean := part.object(last).content:
        part.object(last).take("all", optional(is_number))
        if "tail" in mean:
            part.object(last).take("tail", optional(is_number))
