"""Accuracy over the values of one option of LTAT, as in figures 6 and 7 of the paper: runs, numbers and figure."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ltat_fast.runs.finished import FinishedRun
from ltat_fast.runs.heldout import on_heldout_images
from ltat_fast.runs.jobs import Job, repetitions
from ltat_fast.runs.results import CHECKPOINTS, EvalFile, percentages

CURVES = {"clean": ("clean", "tab:blue"), "pgd20": ("PGD-20", "tab:red")}
GROUPS = {"all": "all classes", "tail": "tail class"}


@dataclass(frozen=True)
class Entry:
    """One line of sensitivity.csv: percent over the finished runs with one value. std is 0.0 for a single seed."""

    option: str
    value: float
    checkpoint: str
    attack: str
    group: str
    mean: float
    std: float
    seeds: int

    def __str__(self) -> str:
        place = f"{self.option} {self.value:g}, {self.checkpoint}, {self.attack}, {self.group}"
        return f"{place}: {self.mean:.2f} ± {self.std:.2f} ({self.seeds})"


def plan(
    option: str,
    values: Sequence[float],
    seeds: Sequence[int],
    out: Path,
    *,
    dataset: str,
    images: str = "test",
    extra: Sequence[str] = (),
) -> dict[float, tuple[Job, ...]]:
    """The runs in ``out`` for each value, one per seed.

    Values that agree in six digits count once. images: "test" or "heldout", the images on which the best epoch is
    selected. extra: flags that every run gets.
    """
    flags = ("--dataset", dataset, "--method", "ltat", "--select-on", images, "--eval-attacks", "clean,pgd20")
    flag = f"--{option.replace('_', '-')}"
    return {
        float(value): repetitions(out / f"{option}{value}", (*flags, flag, value), seeds, extra)
        for value in sorted({f"{value:g}" for value in values}, key=float)
    }


def collect(option: str, jobs: Mapping[float, Sequence[Job]], images: str) -> list[Entry]:
    """The accuracies of the finished runs in ``jobs`` on the "test" or "heldout" images."""
    read = on_test_images if images == "test" else on_heldout_images
    entries = []
    for value, runs in jobs.items():
        results = [read(job.run_dir) for job in runs if (job.run_dir / "eval.json").exists()]
        for checkpoint in CHECKPOINTS:
            for attack in CURVES:
                for group in GROUPS:
                    if percents := percentages(results, checkpoint, attack, group):
                        spread = stdev(percents) if len(percents) > 1 else 0.0
                        numbers = (mean(percents), spread, len(percents))
                        entries.append(Entry(option, value, checkpoint, attack, group, *numbers))
    return entries


def on_test_images(run_dir: Path) -> EvalFile:
    """The results of a finished run on the test images."""
    return FinishedRun.load(run_dir).evaluation


def as_csv(entries: Sequence[Entry]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in dataclasses.fields(Entry)])
    writer.writeheader()
    writer.writerows(map(dataclasses.asdict, entries))
    return text.getvalue()


def draw(option: str, title: str, entries: Sequence[Entry]) -> Figure:
    """Plot all classes on the left (figure 6) and the tail on the right (figure 7).

    Lines of best checkpoints are solid, those of last checkpoints dashed.
    """
    figure = Figure((8, 3.4), layout="constrained")
    for axes, (group, name_of_group) in zip(figure.subplots(1, 2), GROUPS.items(), strict=True):
        for attack, (name, colour) in CURVES.items():
            for checkpoint, style in (("best", "o-"), ("last", "s--")):
                wanted = (attack, group, checkpoint)
                line = [entry for entry in entries if (entry.attack, entry.group, entry.checkpoint) == wanted]
                x, y, spread = ([getattr(entry, field) for entry in line] for field in ("value", "mean", "std"))
                axes.errorbar(x, y, spread, fmt=style, color=colour, capsize=3, label=f"{name}, {checkpoint}")
        values = sorted({entry.value for entry in entries})
        if values and min(values) > 0:
            axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set(xlabel=option, ylabel="accuracy (%)", title=f"{title}: {name_of_group}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure
