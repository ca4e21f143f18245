"""A table of the LTAT paper as training runs, and our numbers rendered beside the paper's.

``paper_tables.json`` holds the tables. A table has experiments, an experiment has rows, and a row has the flags of
``train`` that reproduce it and the published numbers.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from ltat_fast.config import AUTHORS_PRESETS, PRESETS, Config
from ltat_fast.runs import tables
from ltat_fast.runs.finished import RunConfig
from ltat_fast.runs.heldout import on_heldout_images
from ltat_fast.runs.jobs import Job, repetitions
from ltat_fast.runs.results import CHECKPOINTS, EvalFile, percentages


@dataclass(frozen=True)
class Row:
    """One line of a table: its runs, one per seed, and the paper's numbers by checkpoint and heading."""

    title: str
    paper: dict[str, dict[str, float | None]]
    jobs: tuple[Job, ...]
    comparable: bool
    """whether the runs use the paper's dataset"""
    eval_file: str = "eval.json"
    """the file in the run folder that has the numbers; some rows of table 6 have the numbers of the self-teacher"""
    images: str = "test"
    """"test" or "heldout": the images on which the runs are measured"""

    def results(self) -> list[EvalFile]:
        """The results of the runs that have results."""
        files = [path for job in self.jobs if (path := job.run_dir / self.eval_file).exists()]
        if self.images == "test":
            return [EvalFile.load(path) for path in files]
        if self.eval_file != "eval.json":  # a self-teacher is not measured on held-out images
            return []
        return [on_heldout_images(path.parent) for path in files]

    @property
    def name(self) -> str:
        """The title, and whether its runs used the settings of the method's authors."""
        configs = [path for job in self.jobs if (path := job.run_dir / "config.json").exists()]
        authors = any(RunConfig.load(path).has_authors_settings for path in configs)
        return f"{self.title}, authors' settings" if authors else self.title

    def without(self, refused: Sequence[Job]) -> "Row":
        """This row without the runs in ``refused``."""
        return replace(self, jobs=tuple(job for job in self.jobs if job not in refused))


def load_tables() -> dict[str, dict]:
    """The tables of the paper by number."""
    return json.loads((resources.files("ltat_fast") / "paper_tables.json").read_text())


def plan(
    table: dict,
    folder: Path,
    dataset: str | None = None,
    seeds: Sequence[int] = (),
    extra: Sequence[str] = (),
    images: str = "test",
    authors: bool = False,
) -> Iterator[Row]:
    """The rows of ``table`` with the runs that reproduce them.

    folder: where the runs go. dataset: train on this one with its preset; None for the table's own. seeds: one run per
    seed and row; if empty, the seeds that the table lists, or 0. extra: flags that every run gets. images: "test", or
    "heldout" to measure on held-out training images, on which the best epoch is then selected too. authors: train with
    the settings of the method's authors where they are known, in folders of their own.
    """
    several = len(table["experiments"]) > 1
    for experiment in table["experiments"]:
        own = dataset in (None, experiment["dataset"])
        ratio = f"{experiment['imbalance_ratio']:g}"
        chosen = dataset or experiment["dataset"]
        flags = ["--dataset", chosen]
        if own:
            flags += ["--arch", experiment["arch"]]
        if own or several:  # a table over imbalance ratios keeps them on any dataset
            flags += ["--imbalance-ratio", ratio]
        for row in experiment["rows"]:
            title = f"{row['name']} IR {ratio}" if several else row["name"]
            own_flags = (*flags, *row["flags"], *(longer(chosen) if row.get("longer") else ()))
            eval_file = f"{row['stage']}/eval.json" if "stage" in row else "eval.json"
            stem = folder / re.sub(r"[^a-z0-9_.-]+", "-", title.lower())
            if images == "heldout":
                own_flags += ("--select-on", "heldout", "--eval-attacks", "clean")
            if authors and (chosen, row["flags"][1]) in AUTHORS_PRESETS:
                own_flags, stem = (*own_flags, "--settings", "authors"), stem.with_name(f"{stem.name}-authors")
            jobs = repetitions(stem, own_flags, seeds or table.get("seeds", [0]), extra)
            yield Row(title, row["paper"], jobs, own and images == "test", eval_file, images)


def longer(dataset: str) -> tuple[str, str]:
    """The flags that make a method without a teacher train as many epochs as LTAT's teacher and student together."""
    settings = vars(Config()) | PRESETS[dataset]
    return "--epochs", str(settings["epochs"] + settings["teacher_epochs"])


def render(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The table in Markdown, one line per row and checkpoint. The paper's numbers are in brackets if comparable."""
    columns = tables.with_balanced((file for row in rows for file in row.results()), tables.COLUMNS)
    headings = [heading for heading, _, _ in columns]
    lines = [
        "| method | checkpoint | seeds | " + " | ".join(headings) + " |",
        "|---|---|---|" + "---:|" * len(headings),
    ]
    for row in rows:
        results = row.results()
        for which in CHECKPOINTS if row.eval_file == "eval.json" else ("last",):
            cells = []
            for heading, attack, group in columns:
                ours = tables.cell(percentages(results, which, attack, group), len(results))
                theirs = row.paper.get(which, {}).get(heading)
                cells.append(f"{ours} ({theirs:g})" if row.comparable and theirs is not None else ours)
            lines.append(f"| {row.name} | {which} | {len(results)} | " + " | ".join(cells) + " |")
    if any(row.comparable for row in rows):
        known = any(row.paper for row in rows)
        lines += ["", *["In brackets: the paper's numbers."] * known, *(f"Note: {note}." for note in notes)]
    return "\n".join(lines)
