"""Sweep: a whole table of the paper, run or resumed row by row, ours printed beside the paper's.

python -m ltat_fast.sweep --table 1                                     # on the table's own dataset
python -m ltat_fast.sweep --table 1 --dataset digits-lt                 # the same methods on another
python -m ltat_fast.sweep --table 5 --seeds 0 1 2 -- --data-dir DIR     # what follows -- goes to every run

Finished rows are skipped, interrupted ones go on; a row that fails does not stop the others, nor does one whose folder
holds a run of other settings, which is left as it is and not in the table. ``--slurm-partition`` submits each row as a
job instead (needs submitit); call the sweep again later for the table.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import tyro

from ltat_fast import files
from ltat_fast.config import PRESETS, Config, choose
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.runs import log, tables
from ltat_fast.runs.jobs import Job, outstanding, repetitions, split_flags, train_all
from ltat_fast.runs.results import CHECKPOINTS, EvalFile, percentages


@dataclass(frozen=True)
class Arguments:
    """A whole table of the paper, ours beside the paper's."""

    table: str
    """number of the table in the LTAT paper"""
    dataset: str | None = None
    """run the table's methods on this dataset, with its preset, instead of on the table's own"""
    seeds: tuple[int, ...] = ()
    """each gives one run a row; as the paper (one, or five for table 10) if not given"""
    out: Path | None = None
    """where the runs go; runs/table<number>-<dataset> if not given"""
    slurm_partition: str | None = None
    """submit the rows as Slurm jobs to this partition"""
    slurm_minutes: int = 720
    """time limit of such a job"""


@dataclass(frozen=True)
class Row:
    """One line of a table: its runs, one a seed, and what the paper has for it."""

    title: str
    paper: dict[str, dict[str, float | None]]
    jobs: tuple[Job, ...]
    comparable: bool
    """whether the runs are on the paper's dataset"""
    scores: str = "eval.json"
    """where in the folder of a run its numbers are: table 6 has those of the self-teacher"""

    def results(self) -> list[EvalFile]:
        """The results of those of its runs that have some."""
        return [EvalFile.load(path) for job in self.jobs if (path := job.run_dir / self.scores).exists()]


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Exit status 1 if a row failed, or holds a run of other settings."""
    own, forwarded = split_flags(argv)
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.sweep", args=own)
    paper = json.loads((resources.files("ltat_fast") / "paper_tables.json").read_text())
    choose("table", arguments.table, paper)
    if arguments.dataset is not None:
        choose("dataset", arguments.dataset, PRESETS)
    rows = list(plan(paper[arguments.table], arguments, forwarded))
    jobs = [job for row in rows for job in row.jobs]
    todo, refused = outstanding(jobs)
    log.say(f"table {arguments.table}: {len(rows)} rows, {len(jobs)} runs, {len(todo)} to do")
    if len(refused) == len(jobs):
        return 1  # the table that is there is of other settings: it stays
    if arguments.slurm_partition is not None:
        submit(todo, arguments.slurm_partition, arguments.slurm_minutes)
        return 1 if refused else 0
    statuses = train_all(todo, show=lambda line: " test set" in line)
    rows = [replace(row, jobs=tuple(job for job in row.jobs if job not in refused)) for row in rows]
    text = render(rows, paper[arguments.table]["notes"])
    log.say(text)
    with files.atomic_write(folder_of(arguments) / "table.md") as file:
        file.write(f"{text}\n".encode())
    return 1 if refused or any(statuses.values()) else 0


def folder_of(arguments: Arguments) -> Path:
    return arguments.out or Path("runs") / f"table{arguments.table}-{arguments.dataset or 'paper'}"


def plan(table: dict, arguments: Arguments, extra: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a table of paper_tables.json, each with the runs that make it."""
    several = len(table["experiments"]) > 1
    for experiment in table["experiments"]:
        own = arguments.dataset in (None, experiment["dataset"])
        ratio = f"{experiment['imbalance_ratio']:g}"
        dataset = arguments.dataset or experiment["dataset"]
        flags = ["--dataset", dataset]
        if own:
            flags += ["--arch", experiment["arch"]]
        if own or several:  # a table over imbalance ratios keeps them on any dataset
            flags += ["--imbalance-ratio", ratio]
        for row in experiment["rows"]:
            title = f"{row['name']} IR {ratio}" if several else row["name"]
            own_flags = (*flags, *row["flags"], *(longer(dataset) if row.get("longer") else ()))
            scores = f"{row['stage']}/eval.json" if "stage" in row else "eval.json"
            stem = folder_of(arguments) / title.lower().replace(" ", "-")
            jobs = repetitions(stem, own_flags, arguments.seeds or table.get("seeds", [0]), extra)
            yield Row(title, row["paper"], jobs, own, scores)


def longer(dataset: str) -> tuple[str, str]:
    """The flags by which a method without a teacher trains as many epochs as LTAT's teacher and student together."""
    settings = vars(Config()) | PRESETS[dataset]
    return "--epochs", str(settings["epochs"] + settings["teacher_epochs"])


def submit(jobs: list[Job], partition: str, minutes: int) -> None:
    """Each job as a Slurm job with one GPU."""
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm-partition needs submitit: pip install submitit") from None
    if shutil.which("sbatch") is None:  # submitit would start them here, side by side
        raise UserError("--slurm-partition: there is no Slurm here, sbatch is not on the PATH")
    for job in jobs:
        folder = job.log_file.parent / "slurm"
        files.make_folder(folder)
        executor = submitit.AutoExecutor(folder)
        limits = {"slurm_partition": partition, "timeout_min": minutes, "gpus_per_node": 1}
        executor.update_parameters(name=job.run_dir.name, **limits)
        log.say(f"{job.run_dir.name}: Slurm job {executor.submit(subprocess.check_call, job.command).job_id}")


def render(rows: list[Row], notes: list[str]) -> str:
    """The table in Markdown: a line a row and checkpoint, the paper's number behind ours where they are comparable."""
    headings = [heading for heading, _, _ in tables.COLUMNS]
    lines = [
        "| method | checkpoint | seeds | " + " | ".join(headings) + " |",
        "|---|---|---|" + "---:|" * len(headings),
    ]
    for row in rows:
        results = row.results()
        for which in CHECKPOINTS if row.scores == "eval.json" else ("last",):
            cells = []
            for heading, attack, group in tables.COLUMNS:
                ours = tables.cell(percentages(results, which, attack, group), len(results))
                theirs = row.paper.get(which, {}).get(heading)
                cells.append(f"{ours} ({theirs:g})" if row.comparable and theirs is not None else ours)
            lines.append(f"| {row.title} | {which} | {len(results)} | " + " | ".join(cells) + " |")
    if any(row.comparable for row in rows):
        known = any(row.paper for row in rows)
        lines += ["", *["In brackets: the paper's numbers."] * known, *(f"Note: {note}." for note in notes)]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
