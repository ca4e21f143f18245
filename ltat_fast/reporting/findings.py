"""What other programs found out about runs, as tables: RUN/analysis.json, and the checks of RUN/eval.json."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev

from ltat_fast.errors import UserError
from ltat_fast.reporting.study import Study
from ltat_fast.runs.results import read_json
from ltat_fast.runs.tables import CHECKPOINTS, Experiment

# What an analysis is of; "classes" is the order that a note tells.
NOT_A_QUANTITY = {"weights", "teacher", "compared", "eps", "test_set", "classes"}
NOTES = {"classwise": "Accuracy in groups of classes: 0 are the most frequent in training, the last the rarest."}
SHOWN_ONE_BY_ONE = 12  # of a longer list of numbers, mean and range are shown


@dataclass(frozen=True)
class Cell:
    """A quantity of an experiment: over all classes, and of groups of classes where it has them."""

    all: str
    groups: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the analyses of a study: for each quantity its name and a cell an experiment. note: how to read it."""

    title: str
    checkpoint: str
    lines: list[tuple[str, list[Cell]]]
    note: str = ""


def analyses(study: Study) -> tuple[list[Section], list[str]]:
    """The sections of every analysis.json of the study, and sentences on those that cannot be read."""
    damaged, found = [], []
    for experiment in study.experiments:
        found.append([])
        for run in experiment.runs:
            file = run.path / "analysis.json"
            try:
                found[-1].append(read_json(file) if file.exists() else {})
            except UserError:
                damaged.append(f"analysis.json of {run.name} is damaged.")
    sections = []
    for which in CHECKPOINTS:
        parts = [[analysis.get(which) for analysis in runs] for runs in found]
        titles = dict.fromkeys(t for runs in parts for part in runs if isinstance(part, dict) for t in part)
        for title in titles:
            flat = [[dict(_quantities(p[title])) for p in runs if isinstance(p, dict) and title in p] for runs in parts]
            quantities = dict.fromkeys(name for runs in flat for values in runs for name in values)
            of_experiments = list(zip(study.experiments, flat, strict=True))
            lines = [
                (name, [_cell([v[name] for v in runs if name in v], len(e.runs)) for e, runs in of_experiments])
                for name in quantities
            ]
            sections.append(Section(title, which, lines, NOTES.get(title, "")))
    return sections, damaged


def _quantities(part: object) -> Iterator[tuple[str, object]]:
    shown = {k: v for k, v in part.items() if k not in NOT_A_QUANTITY} if isinstance(part, dict) else part
    yield from leaves(shown)


def leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """The numbers and words in nested JSON, each with its place: ``{"gini": {"global": 0.7}}`` gives "gini, global".

    What is told by groups of classes, a dict with "all", stays together.
    """
    if isinstance(value, list) and len(value) > SHOWN_ONE_BY_ONE and all(_is_number(v) for v in value):
        value = {"mean": mean(value), "min": min(value), "max": max(value)}
    if isinstance(value, list):
        value = {str(i): v for i, v in enumerate(value)}
    if isinstance(value, dict) and not _by_group(value):
        for part, inner in value.items():
            yield from leaves(inner, f"{name}, {part}" if name else part)
    elif value is not None:
        yield name or "value", value


def _by_group(value: object) -> bool:
    return isinstance(value, dict) and "all" in value and not any(isinstance(v, dict | list) for v in value.values())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _cell(values: list[object], seeds: int) -> Cell:
    """Mean and standard deviation over the runs that have it, and how many these are if not all."""
    told = [value if _by_group(value) else {"all": value} for value in values]
    groups = dict.fromkeys(group for value in told for group in value if group != "all")
    by_group = {g: _text([v[g] for v in told if v.get(g) is not None]) for g in ["all", *groups]}
    some = f" ({len(values)} of {seeds})" if 0 < len(values) < seeds else ""
    return Cell(by_group.pop("all") + some, list(by_group.items()))


def _text(values: list[object]) -> str:
    if not values:
        return "-"
    if not all(map(_is_number, values)):
        return ", ".join(dict.fromkeys(map(str, values)))
    return f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


@dataclass(frozen=True)
class Check:
    """One check of one run's checkpoint, as its evaluation wrote it."""

    run: str
    checkpoint: str
    name: str
    passed: bool
    detail: str


def checks(experiment: Experiment, which: str) -> list[Check]:
    """All checks of a checkpoint, over the runs."""
    return [
        Check(run.name, which, str(check.get("name")), bool(check.get("passed")), _detail(check))
        for run in experiment.runs
        for check in run.results.get(which, {}).get("checks", [])
        if isinstance(check, dict)
    ]


def _detail(check: dict) -> str:
    value = check.get("value")
    told = [f"{value:.4g}" if _is_number(value) else str(value)] if value is not None else []
    return ": ".join([*told, str(check["detail"])] if check.get("detail") else told)
