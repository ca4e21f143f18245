"""Sweep: run or resume a whole table of the paper, and print our numbers beside the paper's; or compare recipes.

python -m ltat_fast.sweep --table 1                                     # on the table's own dataset
python -m ltat_fast.sweep --table 1 --dataset digits-lt                 # the same methods on another dataset
python -m ltat_fast.sweep --table 5 --seeds 0 1 2 -- --data-dir DIR     # flags after -- go to every run
python -m ltat_fast.sweep --table recipes --dataset digits-lt           # LTAT with each modifier (docs/recipes.md)

Finished runs are skipped, interrupted runs are resumed, and a run that fails does not stop the others. A run folder
that holds a run with other settings is kept as it is and left out of the table. With ``--slurm-partition`` each run is
submitted as a Slurm job (needs submitit); call the sweep again later to print the table.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltat_fast import cli, files
from ltat_fast.config import PRESETS, choose
from ltat_fast.errors import exit_on_user_error
from ltat_fast.reporting.paper_table import load_tables, plan, render
from ltat_fast.reporting.recipes import recipes
from ltat_fast.runs import log
from ltat_fast.runs.jobs import outstanding, split_flags, train_all
from ltat_fast.runs.slurm import submit


@dataclass(frozen=True)
class Arguments:
    """Run or resume a whole table of the paper, and print our numbers beside the paper's; or compare recipes."""

    table: str
    """number of the table in the LTAT paper; or recipes: AT-BSL, LTAT, LTAT with each modifier and with all, and LTAT
    with one attack step, alone and with all modifiers"""
    dataset: str | None = None
    """train on this dataset, with its preset, instead of the table's own"""
    seeds: tuple[int, ...] = ()
    """train one run per row with each of these seeds; empty: the number of seeds of the paper, five for table 10"""
    images: Literal["test", "heldout"] = "test"
    """test: measure on test images; heldout: on held-out training images, the correct way to choose among recipes"""
    settings: Literal["paper", "authors"] = "paper"
    """authors: train a method with the settings of its authors where they are known (docs/ltat.md), in a folder of its
    own, and say so in the table"""
    out: Path | None = None
    """folder for the runs and table.md; default: runs/table<number>-<dataset>[-heldout], for recipes
    runs/recipes-<dataset>[-heldout]"""
    slurm_partition: str | None = None
    """submit the runs as Slurm jobs to this partition"""
    slurm_minutes: int = 720
    """time limit of each Slurm job"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Return 1 if a run failed or its folder holds a run with other settings, else 0."""
    own, forwarded = split_flags(argv)
    arguments = cli.parse(Arguments, "python -m ltat_fast.sweep", own)
    tables = load_tables() | {"recipes": recipes(arguments.dataset)}
    choose("table", arguments.table, tables)
    if arguments.dataset is not None:
        choose("dataset", arguments.dataset, PRESETS)
    table, number = tables[arguments.table], arguments.table
    name = f"table{number}" if number.isdigit() else number
    suffix = "-heldout" if arguments.images == "heldout" else ""
    dataset = arguments.dataset or ("paper" if number.isdigit() else table["experiments"][0]["dataset"])
    out = arguments.out or Path("runs") / f"{name}-{dataset}{suffix}"
    authors = arguments.settings == "authors"
    rows = list(plan(table, out, arguments.dataset, arguments.seeds, forwarded, arguments.images, authors))
    jobs = [job for row in rows for job in row.jobs]
    todo, refused = outstanding(jobs)
    log.say(f"table {number}: {len(rows)} rows, {len(jobs)} runs, {len(todo)} to do")
    if len(refused) == len(jobs):
        return 1  # keep the existing table: its runs used other settings
    if arguments.slurm_partition is not None:
        submit(todo, arguments.slurm_partition, arguments.slurm_minutes)
        return 1 if refused else 0
    statuses = train_all(todo, show=lambda line: " test set" in line, study=jobs)
    text = render([row.without(refused) for row in rows], table["notes"])
    log.say(text)
    with files.atomic_write(out / "table.md") as file:
        file.write(f"{text}\n".encode())
    return 1 if refused or any(statuses.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
