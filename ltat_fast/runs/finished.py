"""Finished runs with typed, checked fields, read from config.json, env.json and eval.json of their folders."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ltat_fast.config import parse_fraction
from ltat_fast.data.digest import digest
from ltat_fast.errors import UserError
from ltat_fast.runs.json_object import JsonObject, is_count, is_integer, is_number, is_text, list_of, optional
from ltat_fast.runs.results import EvalFile
from ltat_fast.runs.threats import exact_fraction

NEEDED = {"dataset", "method", "arch", "imbalance_ratio", "select_on", "seed", "eps"}


@dataclass(frozen=True)
class RunConfig:
    """The settings in a config.json that this version or another one wrote.

    It is less strict than :class:`ltat_fast.config.Config`: missing settings are None, and settings that this version
    does not know are kept. The dataset, method and network may have names that this version does not know.
    """

    dataset: str
    method: str
    arch: str
    imbalance_ratio: float | None
    select_on: str
    seed: int
    eps: str
    step_size: str | None
    attack_steps: int | None
    eval_attacks: str | None
    teacher: str | None
    data_dir: str | None
    settings: dict[str, Any]
    """every setting of the file except the options of the method"""
    method_options: dict[str, Any]

    @classmethod
    def load(cls, path: Path) -> "RunConfig":
        """Read ``path``. Raises UserError if it is missing, damaged or lacks one of :data:`NEEDED`."""
        content = JsonObject.load(path)
        if missing := NEEDED - content.content.keys():
            raise content.damaged(f"it lacks {', '.join(sorted(missing))}")
        return cls(
            dataset=content.take("dataset", is_text),
            method=content.take("method", is_text),
            arch=content.take("arch", is_text),
            imbalance_ratio=content.take("imbalance_ratio", optional(is_number)),
            select_on=content.take("select_on", is_text),
            seed=content.take("seed", is_integer),
            eps=content.take("eps", is_fraction),
            step_size=content.take("step_size", optional(is_fraction), None),
            attack_steps=content.take("attack_steps", optional(is_integer), None),
            eval_attacks=content.take("eval_attacks", optional(is_text), None),
            teacher=content.take("teacher", optional(is_text), None),
            data_dir=content.take("data_dir", optional(is_text), None),
            settings={name: value for name, value in content.content.items() if name != "method_options"},
            method_options=content.object("method_options").content,
        )

    @property
    def has_authors_settings(self) -> bool:
        """Whether the run used the settings of the method's authors instead of those of the LTAT paper."""
        return self.settings.get("settings") == "authors"

    @property
    def ratio_text(self) -> str:
        return "as found" if self.imbalance_ratio is None else f"{self.imbalance_ratio:g}"


def is_fraction(value: Any) -> bool:
    """Whether ``value`` is a text such as "8/255" or "0.031", above 0 and at most 1."""
    try:
        return is_text(value) and parse_fraction(value) > 0 and exact_fraction(value) > 0
    except (UserError, ValueError, ZeroDivisionError):
        return False


@dataclass(frozen=True)
class Environment:
    """The fields of an env.json that reports show; those that the file lacks are empty."""

    command: str | None = None
    python: str | None = None
    packages: dict[str, str | None] = field(default_factory=dict)
    """version by package; None if it was not installed"""
    gpu: str | None = None
    machine: str | None = None
    precision: str | None = None
    threads: int | None = None
    git: str | None = None
    index_hash: str | None = None
    """hash that identifies the selection of training images"""
    class_counts: tuple[int, ...] = ()
    """training images per class"""
    data: dict[str, str] = field(default_factory=dict)
    """checksums of images, labels, class names and a given teacher; empty for runs of early versions"""

    @classmethod
    def load_or_empty(cls, path: Path) -> "Environment":
        """Read ``path``, which runs of early versions do not have. Raises UserError if it is damaged."""
        if not path.exists():
            return cls()
        content = JsonObject.load(path)
        packages, data = content.object("packages"), content.object("data")
        texts = ("command", "python", "gpu", "machine", "precision", "git", "index_hash")
        return cls(
            packages={name: packages.take(name, optional(is_text)) for name in packages.content},
            data={name: data.take(name, is_text) for name in data.content},
            threads=content.take("threads", optional(is_count), None),
            class_counts=tuple(content.take("class_counts", list_of(is_count), ())),
            **{name: content.take(name, optional(is_text), None) for name in texts},
        )


@dataclass(frozen=True)
class FinishedRun:
    """A run with results. name: the last parts of its path, as many as make it unique."""

    name: str
    path: Path
    config: RunConfig
    evaluation: EvalFile
    environment: Environment

    @property
    def training_set(self) -> str | None:
        """Identifies the training images and labels, as far as the run recorded them."""
        data, selection = self.environment.data, self.environment.index_hash
        if not data:
            return selection
        return digest([selection, *(data.get(name) for name in ("class names", "training images", "training labels"))])

    @property
    def test_set(self) -> str | None:
        """Identifies the test images and labels of the results. Raises UserError if there are several test sets."""
        known = self.evaluation.test_sets
        if len(known) > 1:
            what = f"{self.path / 'eval.json'} has results on {len(known)} different test sets"
            raise UserError(f"{what}: remove it and evaluate the run again")
        return known.pop() if known else None

    @classmethod
    def load(cls, path: Path, name: str | None = None) -> "FinishedRun":
        """Read the run folder ``path``. Raises UserError if it has no results or one of its files is damaged."""
        config, evaluation = RunConfig.load(path / "config.json"), EvalFile.load(path / "eval.json")
        environment = Environment.load_or_empty(path / "env.json")
        for result in evaluation.every_result():
            counts, accuracies = len(environment.class_counts), len(result.per_class)
            if counts and accuracies and counts != accuracies:
                said = f"class_counts has {counts} classes, eval.json has {accuracies}"
                raise UserError(f"{path / 'env.json'} is damaged: {said}")
        return cls(name or path.name, path, config, evaluation, environment)


def load_runs(run_dirs: Sequence[Path]) -> list[FinishedRun]:
    """Load each run once, even if it is named several times. Raises UserError for a run without results."""
    paths = list(dict.fromkeys(path.resolve() for path in run_dirs))
    return [FinishedRun.load(path, _shortest_name(path, paths)) for path in paths]


def _shortest_name(path: Path, paths: list[Path]) -> str:
    for length in range(1, len(path.parts) + 1):
        if sum(other.parts[-length:] == path.parts[-length:] for other in paths) == 1:
            break
    return "/".join(path.parts[-length:])
