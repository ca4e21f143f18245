"""Demo: compare LTAT with AT-BSL and PGD-AT on the embedded long-tailed digits, offline, in minutes on two CPU cores.

python -m ltat_fast.demo [--seeds 0 1 2] [--out runs/demo]

Prints a table and writes a page with plots and pictures beside the runs. Finished runs are skipped and interrupted runs
are resumed.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import time
from dataclasses import dataclass
from pathlib import Path

from ltat_fast import cli, report
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.runs import log
from ltat_fast.runs.jobs import outstanding, repetitions, train_all

METHODS = ("ltat", "at-bsl", "pgd-at")  # the slowest first, so that two workers finish at about the same time
FLAGS = ("--dataset", "digits-lt", "--limit-autoattack", "100")


@dataclass(frozen=True)
class Arguments:
    """Train LTAT, AT-BSL and PGD-AT on the embedded digits and report them as a table and a page."""

    seeds: tuple[int, ...] = (0,)
    """train one run per method with each of these seeds; the table shows mean and standard deviation"""
    out: Path = Path("runs/demo")
    """folder for the runs and report.html"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, "python -m ltat_fast.demo", argv)
    started = time.monotonic()
    by_method = [
        repetitions(arguments.out / method, ("--method", method, *FLAGS), arguments.seeds) for method in METHODS
    ]
    jobs = [job for of_one_seed in zip(*by_method, strict=True) for job in of_one_seed]
    todo, refused = outstanding(jobs)
    if refused:
        raise UserError(f"{arguments.out} holds runs with other settings than the demo: choose another --out")
    statuses = train_all(todo, show=lambda line: "test_clean" in line or " test set" in line, study=jobs)
    if failed := [job.run_dir.name for job, status in statuses.items() if status]:
        raise UserError(f"{', '.join(failed)} did not finish: see the .log files beside the run folders")
    report.main([*(str(job.run_dir) for job in jobs), "--html", str(arguments.out / "report.html")])
    log.say(f"Done in {time.monotonic() - started:.0f} s.")


if __name__ == "__main__":
    main()
