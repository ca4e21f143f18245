"""Sensitivity: accuracy of all and of the tail classes over an option of LTAT, as figures 6 and 7 of the paper.

python -m ltat_fast.sensitivity --option alpha --values 1 3 5 10 --seeds 0 1 2
python -m ltat_fast.sensitivity --option gamma --values 1 2 5 10 --dataset cifar100-lt -- --data-dir DIR
python -m ltat_fast.sensitivity --option kl_weight --values 0 0.5 1 --images heldout      # to choose one

What follows -- goes to every run; ``--teacher RUN/teacher`` there spares each run a teacher of its own. Finished runs
are kept, interrupted ones go on; a run of other settings in the place of one is left as it is and not counted. Writes
sensitivity.csv and sensitivity.png beside the runs; deviations are those over the seeds.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ltat_fast import files
from ltat_fast.config import PRESETS, choose
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.runs import log
from ltat_fast.runs.finished import FinishedRun
from ltat_fast.runs.jobs import Job, outstanding, repetitions, split_flags, train_all
from ltat_fast.runs.results import CHECKPOINTS, CheckpointResults, EvalFile, Result, percentages

CURVES = {"clean": ("clean", "tab:blue"), "pgd20": ("PGD-20", "tab:red")}
GROUPS = {"all": "all classes", "tail": "tail class"}
COLUMNS = ("option", "value", "checkpoint", "attack", "group", "mean", "std", "seeds")


@dataclass(frozen=True)
class Arguments:
    """LTAT at several values of one option."""

    values: tuple[float, ...]
    """what the option is set to; gamma is in units of the smallest class, the paper's default is IR / 2"""
    option: Literal["alpha", "gamma", "kl_weight"] = "alpha"
    """alpha: weight of the gradient matching; gamma: images a class in the teacher's balanced set; kl_weight: weight of
    the plain distillation"""
    images: Literal["test", "heldout"] = "test"
    """judge by the test images, as the paper's figures, or by training images held out, as one should to choose"""
    dataset: str = "digits-lt"
    """with its preset"""
    seeds: tuple[int, ...] = (0,)
    """each gives one run a value"""
    out: Path | None = None
    """where the runs go; runs/sensitivity-<option>-<dataset>[-heldout] if not given"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a run failed, or is of other settings."""
    own, forwarded = split_flags(argv)
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.sensitivity", args=own)
    choose("dataset", arguments.dataset, PRESETS)
    if not arguments.values or not arguments.seeds:
        raise UserError("--values and --seeds need at least one number each")
    suffix = "-heldout" if arguments.images == "heldout" else ""
    out = arguments.out or Path("runs") / f"sensitivity-{arguments.option}-{arguments.dataset}{suffix}"
    jobs = plan(arguments, out, forwarded)
    every = [job for runs in jobs.values() for job in runs]
    todo, refused = outstanding(every)
    log.say(f"{arguments.option}: {len(jobs)} values, {len(every)} runs, {len(todo)} to do")
    if len(refused) == len(every):
        return 1  # the figure that is there is of other settings: it stays
    statuses = train_all(todo, show=lambda line: "on the test set:" in line)
    jobs = {value: [job for job in runs if job not in refused] for value, runs in jobs.items()}
    entries = collect(arguments.option, jobs, arguments.images)
    figure = draw(arguments.option, f"{arguments.dataset}, {arguments.images} images", entries)
    for entry in entries:
        log.say("{option} {value:g}, {checkpoint}, {attack}, {group}: {mean:.2f} ± {std:.2f} ({seeds})".format(**entry))
    with files.atomic_write(out / "sensitivity.csv") as file:
        file.write(as_csv(entries).encode())
    with files.atomic_write(out / "sensitivity.png") as file:
        figure.savefig(file, dpi=100)
    log.say(f"wrote {out / 'sensitivity.csv'} and {out / 'sensitivity.png'}")
    return 1 if refused or any(statuses.values()) else 0


def plan(arguments: Arguments, out: Path, extra: tuple[str, ...]) -> dict[float, tuple[Job, ...]]:
    """The runs of each value, a run a seed. Values that differ in no digit that is shown are one."""
    option, flags = arguments.option, ("--dataset", arguments.dataset, "--method", "ltat")
    flags += ("--select-on", arguments.images, "--eval-attacks", "clean,pgd20")
    flag = f"--{option.replace('_', '-')}"
    return {
        float(value): repetitions(out / f"{option}{value}", (*flags, flag, value), arguments.seeds, extra)
        for value in sorted({f"{value:g}" for value in arguments.values}, key=float)
    }


def collect(option: str, jobs: dict[float, Sequence[Job]], images: str) -> list[dict]:
    """A line of :data:`COLUMNS` a value, checkpoint, attack and group: percent, over the runs that are finished."""
    read = on_test_images if images == "test" else on_heldout_images
    entries = []
    for value, runs in jobs.items():
        results = [read(job.run_dir) for job in runs if (job.run_dir / "eval.json").exists()]
        for checkpoint in CHECKPOINTS:
            for attack in CURVES:
                for group in GROUPS:
                    if scores := percentages(results, checkpoint, attack, group):
                        spread = stdev(scores) if len(scores) > 1 else 0.0
                        line = (option, value, checkpoint, attack, group, mean(scores), spread, len(scores))
                        entries.append(dict(zip(COLUMNS, line, strict=True)))
    return entries


def on_test_images(run_dir: Path) -> EvalFile:
    """The results of a finished run."""
    return FinishedRun.load(run_dir).evaluation


def on_heldout_images(run_dir: Path) -> EvalFile:
    """:func:`on_test_images`, of the images that picked the best epoch. They are in metrics.jsonl, epoch by epoch."""
    records = [record for record in log.read_metrics(run_dir / "metrics.jsonl") if "heldout_pgd20" in record]
    if not records:
        return EvalFile()
    chosen = {"best": max(records, key=lambda record: record["heldout_pgd20"]), "last": records[-1]}
    return EvalFile({checkpoint: CheckpointResults(_heldout(record)) for checkpoint, record in chosen.items()})


def _heldout(record: dict) -> dict[str, Result]:
    """The results of an epoch on the images held out."""
    return {
        attack: Result(record[f"heldout_{attack}"], {"tail": record.get(f"heldout_tail_{attack}")}) for attack in CURVES
    }


def as_csv(entries: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(entries)
    return text.getvalue()


def draw(option: str, images: str, entries: list[dict]) -> Figure:
    """All classes left (figure 6), the tail right (figure 7); best checkpoints solid, last ones dashed.

    images: what the accuracies are of, for the titles.
    """
    figure = Figure((8, 3.4), layout="constrained")
    for axes, (group, title) in zip(figure.subplots(1, 2), GROUPS.items(), strict=True):
        for attack, (name, colour) in CURVES.items():
            for checkpoint, style in (("best", "o-"), ("last", "s--")):
                wanted = (attack, group, checkpoint)
                line = [e for e in entries if (e["attack"], e["group"], e["checkpoint"]) == wanted]
                x, y, spread = ([e[key] for e in line] for key in ("value", "mean", "std"))
                axes.errorbar(x, y, spread, fmt=style, color=colour, capsize=3, label=f"{name}, {checkpoint}")
        values = sorted({e["value"] for e in entries})
        if values and min(values) > 0:
            axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set(xlabel=option, ylabel="accuracy (%)", title=f"{images}: {title}")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


if __name__ == "__main__":
    raise SystemExit(main())
