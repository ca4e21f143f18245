"""The analyses of runs (RUN/analysis.json) and the checks of their evaluation (RUN/eval.json) as tables of text."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev

from ltat_fast.analysis.results import AnalysisFile, Part
from ltat_fast.errors import UserError
from ltat_fast.reporting.study import Study
from ltat_fast.runs.experiments import Experiment
from ltat_fast.runs.json_object import is_number
from ltat_fast.runs.results import CHECKPOINTS

ORDER_OF_CLASSES = "classes"  # the key that is explained by a note instead of shown
NOTES = {"classwise": "Accuracy in groups of classes: 0 are the most frequent in training, the last the rarest."}
SHOWN_ONE_BY_ONE = 12  # a longer list of numbers is shown as mean, min and max

Value = dict[str, object]  # by "all" and the groups of classes


@dataclass(frozen=True)
class Cell:
    """A quantity of an experiment: over all classes, and for groups of classes if it has them."""

    all: str
    groups: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """One part of the analyses of a study. lines: the name of each quantity and one cell per experiment."""

    title: str
    checkpoint: str
    lines: list[tuple[str, list[Cell]]]
    note: str = ""


def analyses(study: Study) -> tuple[list[Section], list[str]]:
    """The sections of every analysis.json of the study, and a sentence for each one that is damaged."""
    damaged, found = [], []
    for experiment in study.experiments:
        found.append([])
        for run in experiment.runs:
            file = run.path / "analysis.json"
            try:
                found[-1].append(AnalysisFile.load_or_empty(file))
            except UserError:
                damaged.append(f"analysis.json of {run.name} is damaged.")
    sections = []
    for which in CHECKPOINTS:
        parts = [[analysis.of(which) for analysis in runs] for runs in found]
        for title in dict.fromkeys(title for runs in parts for of_run in runs for title in of_run):
            flat = [[dict(_quantities(of_run[title])) for of_run in runs if title in of_run] for runs in parts]
            quantities = dict.fromkeys(name for runs in flat for values in runs for name in values)
            of_experiments = list(zip(study.experiments, flat, strict=True))
            lines = [
                (name, [_cell([v[name] for v in runs if name in v], len(e.runs)) for e, runs in of_experiments])
                for name in quantities
            ]
            sections.append(Section(title, which, lines, NOTES.get(title, "")))
    return sections, damaged


def _quantities(part: Part) -> Iterator[tuple[str, Value]]:
    yield from leaves({name: value for name, value in part.numbers.items() if name != ORDER_OF_CLASSES})
    if part.images is not None:
        yield "images", {"all": part.images}


def leaves(value: object, name: str = "") -> Iterator[tuple[str, Value]]:
    """Yield the numbers and words in nested JSON with their places: ``{"gini": {"global": 0.7}}`` gives "gini, global".

    A mean, which is a dict of "all" and groups of classes, is yielded as one value. Anything else is yielded as "all".
    """
    match value:
        case None:
            pass
        case {"all": _} if not any(map(_is_nested, value.values())):
            yield name or "value", value
        case dict():
            for part, inner in value.items():
                yield from leaves(inner, f"{name}, {part}" if name else part)
        case [*numbers] if len(numbers) > SHOWN_ONE_BY_ONE and all(map(_is_number, numbers)):
            yield from leaves({"mean": mean(numbers), "min": min(numbers), "max": max(numbers)}, name)
        case [*values]:
            yield from leaves({str(i): each for i, each in enumerate(values)}, name)
        case _:
            yield name, {"all": value}


def _is_nested(value: object) -> bool:
    return isinstance(value, list | dict)


def _is_number(value: object) -> bool:
    return is_number(value) and isfinite(value)


def _cell(values: list[Value], seeds: int) -> Cell:
    """Mean and standard deviation over the runs that have the quantity, with their number if some lack it."""
    groups = dict.fromkeys(group for value in values for group in value if group != "all")
    by_group = {g: _text([v[g] for v in values if v.get(g) is not None]) for g in ["all", *groups]}
    some = f" ({len(values)} of {seeds})" if 0 < len(values) < seeds else ""
    return Cell(by_group.pop("all") + some, list(by_group.items()))


def _text(values: list[object]) -> str:
    if not values:
        return "-"
    if not all(map(_is_number, values)):
        return ", ".join(dict.fromkeys(map(str, values)))
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


@dataclass(frozen=True)
class ShownCheck:
    """One check of one run's checkpoint, as the page shows it."""

    run: str
    checkpoint: str
    name: str
    passed: bool
    detail: str


def checks(experiment: Experiment, which: str) -> list[ShownCheck]:
    """All checks of a checkpoint, over the runs."""
    return [
        ShownCheck(run.name, which, check.name, check.passed, f"{check.value:.4g}: {check.detail}")
        for run in experiment.runs
        for check in run.evaluation.of(which).checks
    ]
