"""The numbers of the runs as CSV, with one accuracy per line, and the table as Markdown."""

import csv
import io
from collections.abc import Iterator

from ltat_fast.runs import tables
from ltat_fast.runs.experiments import Experiment, comparable_worst
from ltat_fast.runs.results import CHECKPOINTS

HEADER = ("run", "method", "dataset", "imbalance_ratio", "arch", "seed", "checkpoint", "attack", "group", "class")
HEADER += ("train_images", "test_images", "accuracy")


def as_csv(found: list[Experiment]) -> str:
    """One line per run, checkpoint, attack and group of classes, and one per class (group "class").

    accuracy: percent, with every digit of eval.json; empty if there was no image. train_images: number for the class,
    if known. test_images: number for the whole evaluation, not for the group. The worst case is left out if the runs of
    an experiment combined different attacks.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    writer.writerows(_lines(found))
    return out.getvalue()


def _lines(found: list[Experiment]) -> Iterator[tuple]:
    for experiment in found:
        for run in experiment.runs:
            c = run.config
            of_run = (run.name, experiment.label, c.dataset, c.imbalance_ratio, c.arch, c.seed)
            counts = run.environment.class_counts
            for which in CHECKPOINTS:
                for attack, result in run.evaluation.of(which).results.items():
                    if attack == "worst" and not comparable_worst(experiment.runs, which):
                        continue
                    start = (*of_run, which, attack)
                    for group, accuracy in {"all": result.all, **result.groups}.items():
                        yield (*start, group, None, None, result.images, accuracy)
                    for c, accuracy in enumerate(result.per_class):
                        yield (*start, "class", c, counts[c] if counts else None, result.images, accuracy)


def as_markdown(found: list[Experiment]) -> str:
    """The tables that the terminal shows, as Markdown."""
    return "\n".join("\n".join(_markdown(table)) for table in tables.build(found))


def _markdown(table: tables.Table) -> Iterator[str]:
    rows = [[row.label, row.checkpoint, str(row.seeds), *row.cells] for row in table.rows]
    rule = ["---"] * 3 + ["---:"] * len(table.headings)
    yield from (f"**{table.title}**", "")
    for row in (["method", "checkpoint", "seeds", *table.headings], rule, *rows):
        yield "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
    yield from ("", *(f"{note}  " for note in table.notes), "")
