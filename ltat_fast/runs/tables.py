"""The paper's table of finished runs: Clean, PGD, AA, T-Clean and T-PGD of best and last, mean and std over seeds."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ltat_fast.runs.experiments import Experiment, comparable_worst, experiments
from ltat_fast.runs.finished import RunConfig
from ltat_fast.runs.results import BALANCED, CHECKPOINTS, CheckpointResults, EvalFile

# heading, attack, group of classes
COLUMNS = [
    ("Clean", "clean", "all"),
    ("PGD", "pgd20", "all"),
    ("AA", "autoattack", "all"),
    ("T-Clean", "clean", "tail"),
    ("T-PGD", "pgd20", "tail"),
]
# Shown if a run has them: means of the accuracies of the classes, on a test set whose classes differ in size.
BALANCED_COLUMNS = [("B-Clean", "clean", BALANCED), ("B-PGD", "pgd20", BALANCED)]
# Shown if a run has them: images that are classified correctly under every attack.
WORST_COLUMNS = [("Worst", "worst", "all"), ("T-Worst", "worst", "tail")]
# Shown if a run has them: the groups of Liu et al. 2019, by training images of the class.
SHOT_COLUMNS = [
    (f"{heading}-{attack}", key, group)
    for heading, group in (("Many", "many_shot"), ("Med", "medium_shot"), ("Few", "few_shot"))
    for attack, key in (("Clean", "clean"), ("PGD", "pgd20"))
]
SELECTED_ON = {"heldout": "held-out training images", "val": "the validation split"}
NUMBERS_FROM = 6  # the columns before this one name the experiment


@dataclass(frozen=True)
class Row:
    """One line of the table. images: numbers of test images; values: percent of each run, by heading."""

    label: str
    config: RunConfig
    checkpoint: str
    seeds: int
    images: set[int]
    values: dict[str, list[float]]


def columns(found: Sequence[Experiment]) -> list[tuple[str, str, str]]:
    """The paper's columns, those of the balanced accuracy if a run has it, and those of a comparable worst case.

    The worst case is comparable if some run has it on as many images as the other attacks, and all runs that have it
    combined the same attacks at each checkpoint.
    """
    runs = [run for experiment in found for run in experiment.runs]
    evaluated = [run.evaluation.of(which) for run in runs for which in CHECKPOINTS]
    has_worst = any(map(_has_worst_of_all, evaluated)) and all(comparable_worst(runs, which) for which in CHECKPOINTS)
    shown = with_balanced((run.evaluation for run in runs), COLUMNS) + (SHOT_COLUMNS if _has_shots(found) else [])
    return shown + (WORST_COLUMNS if has_worst else [])


def _has_shots(found: Sequence[Experiment]) -> bool:
    return any(run.evaluation.has_group("many_shot") for experiment in found for run in experiment.runs)


def with_balanced(files: Iterable[EvalFile], columns: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return ``columns``, with those of the balanced accuracy if one of ``files`` has it."""
    return columns + BALANCED_COLUMNS if any(file.has_group(BALANCED) for file in files) else columns


def _has_worst_of_all(evaluated: CheckpointResults) -> bool:
    """Whether the worst case is on as many images as any attack; on fewer it could not be compared with the others."""
    images = {name: r.images for name, r in evaluated.results.items() if r.images is not None}
    return "worst" in images and images["worst"] == max(images.values())


def rows(found: Sequence[Experiment]) -> list[Row]:
    """One row per experiment and checkpoint."""
    shown = columns(found)
    return [
        Row(
            experiment.label,
            experiment.config,
            which,
            len(experiment.runs),
            experiment.images(which, "clean") | experiment.images(which, "autoattack"),
            {heading: experiment.values(which, attack, group) for heading, attack, group in shown},
        )
        for experiment in found
        for which in CHECKPOINTS
    ]


def cell(values: list[float], seeds: int) -> str:
    """Format "38.85"; over several seeds "38.85 ± 0.21"; if only some have a value "38.85 (1 of 3)"; if none "-"."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def cells(found: Sequence[Experiment]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table as text. The columns from :data:`NUMBERS_FROM` on hold numbers."""
    headings = [heading for heading, _, _ in columns(found)]
    lines = []
    for row in rows(found):
        c = row.config
        name = [row.label, c.dataset, c.ratio_text, c.arch, row.checkpoint, str(row.seeds)]
        lines.append(name + [cell(row.values[heading], row.seeds) for heading in headings])
    return ["method", "dataset", "IR", "arch", "checkpoint", "seeds", *headings], lines


def render(run_dirs: Sequence[Path]) -> str:
    """The table as text."""
    found = experiments(run_dirs)
    headings, lines = cells(found)
    table = Table(title=None)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i >= NUMBERS_FROM else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    out = io.StringIO()
    # Wider than necessary, because a narrow console would cut numbers off.
    Console(file=out, width=250 + max(len(experiment.label) for experiment in found)).print(table)
    return out.getvalue() + note(found)


def note(found: Sequence[Experiment]) -> str:
    """The number of test images, what the columns mean, and how the best checkpoint was selected."""
    images = sorted(set().union(*(row.images for row in rows(found))))
    selected_on = {experiment.config.select_on for experiment in found}
    balanced = " B-: mean of the accuracies of the classes." if BALANCED_COLUMNS[0] in columns(found) else ""
    shots = " Classes with > 100, 20 to 100 and < 20 training images: Many, Med, Few." if _has_shots(found) else ""
    images_text = " or ".join(map(str, images)) or "the"
    return f"Percent of {images_text} test images; tail: see eval.json.{balanced}{shots} " + (
        f"Best epoch by PGD-20 on {' or '.join(SELECTED_ON[name] for name in sorted(selected_on))}."
        if selected_on and selected_on <= SELECTED_ON.keys()
        else "Best epoch by PGD-20 on the test set, as in the published tables: optimistic; compare last too."
    )
