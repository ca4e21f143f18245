"""Sensitivity: accuracy of all classes and of the tail over the values of one option of LTAT (figures 6 and 7).

python -m ltat_fast.sensitivity --option alpha --values 1 3 5 10 --seeds 0 1 2
python -m ltat_fast.sensitivity --option gamma --values 1 2 5 10 --dataset cifar100-lt -- --data-dir DIR
python -m ltat_fast.sensitivity --option kl_weight --values 0 0.5 1 --images heldout      # to choose a value

Flags after -- go to every run; with ``--teacher RUN/teacher`` there, no run trains a teacher of its own. Finished runs
are skipped and interrupted runs are resumed. A run folder that holds a run with other settings is kept as it is and not
counted. Writes sensitivity.csv and sensitivity.png beside the runs; deviations are over the seeds.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ltat_fast import cli, files
from ltat_fast.analysis.sensitivity import as_csv, collect, draw, plan
from ltat_fast.config import PRESETS, choose
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.runs import log
from ltat_fast.runs.jobs import outstanding, split_flags, train_all


@dataclass(frozen=True)
class Arguments:
    """Train LTAT with several values of one option and plot the accuracy over them."""

    values: tuple[float, ...]
    """values of the option; gamma is in units of the smallest class, and the paper's default is IR / 2"""
    option: Literal["alpha", "gamma", "kl_weight", "awp", "ema", "eps_balance", "label_smoothing"] = "alpha"
    """alpha: weight of gradient matching; gamma: size of the teacher's balanced set; kl_weight: plain distillation; the
    others are the modifiers of that name"""
    images: Literal["test", "heldout"] = "test"
    """test: measure on test images, as in the paper; heldout: on held-out training images, the correct way to choose"""
    dataset: str = "digits-lt"
    """dataset to train on, with its preset"""
    seeds: tuple[int, ...] = (0,)
    """train one run per value with each of these seeds"""
    out: Path | None = None
    """folder for the runs; default: runs/sensitivity-<option>-<dataset>[-heldout]"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Return 1 if a run failed or its folder holds a run with other settings, else 0."""
    own, forwarded = split_flags(argv)
    arguments = cli.parse(Arguments, "python -m ltat_fast.sensitivity", own)
    option, images, dataset = arguments.option, arguments.images, arguments.dataset
    choose("dataset", dataset, PRESETS)
    if not arguments.values or not arguments.seeds:
        raise UserError("--values and --seeds need at least one number each")
    suffix = "-heldout" if images == "heldout" else ""
    out = arguments.out or Path("runs") / f"sensitivity-{option}-{dataset}{suffix}"
    jobs = plan(option, arguments.values, arguments.seeds, out, dataset=dataset, images=images, extra=forwarded)
    every = [job for runs in jobs.values() for job in runs]
    todo, refused = outstanding(every)
    log.say(f"{option}: {len(jobs)} values, {len(every)} runs, {len(todo)} to do")
    if len(refused) == len(every):
        return 1  # keep the existing figure: its runs used other settings
    statuses = train_all(todo, show=lambda line: "on the test set:" in line, study=every)
    jobs = {value: [job for job in runs if job not in refused] for value, runs in jobs.items()}
    entries = collect(option, jobs, images)
    figure = draw(option, f"{dataset}, {images} images", entries)
    for entry in entries:
        log.say(str(entry))
    with files.atomic_write(out / "sensitivity.csv") as file:
        file.write(as_csv(entries).encode())
    with files.atomic_write(out / "sensitivity.png") as file:
        figure.savefig(file, dpi=100)
    log.say(f"wrote {out / 'sensitivity.csv'} and {out / 'sensitivity.png'}")
    return 1 if refused or any(statuses.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
