"""Demo: LTAT against PGD-AT and AT-BSL on the embedded long-tailed digits, offline, in minutes on two CPU cores.

python -m ltat_fast.demo [--seeds 0 1 2] [--out runs/demo]

Runs that are already there are kept, interrupted ones go on.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

from ltat_fast.engine import log, tables
from ltat_fast.errors import UserError, exit_on_user_error

METHODS = ("ltat", "at-bsl", "pgd-at")  # the longest first, so that two workers finish together
FLAGS = ("--dataset", "digits-lt", "--limit-autoattack", "100")


@dataclass(frozen=True)
class Arguments:
    """LTAT, AT-BSL and PGD-AT on the embedded digits, as one table."""

    seeds: tuple[int, ...] = (0,)
    """each gives one run a method; the table shows mean and standard deviation"""
    out: Path = Path("runs/demo")
    """where the runs go"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.demo", args=argv)
    started = time.monotonic()
    jobs = [(method, seed) for seed in arguments.seeds for method in METHODS]
    workers = max(1, min(len(jobs), os.cpu_count() or 1))
    log.say(f"{len(jobs)} runs on the embedded digits, {workers} at a time; logs in {arguments.out}/*.log")
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: _train(*job, arguments.out, workers), jobs))
    log.say(tables.render([_run_dir(arguments.out, *job) for job in jobs]))
    log.say(f"Done in {time.monotonic() - started:.0f} s.")


def _run_dir(out: Path, method: str, seed: int) -> Path:
    return out / f"{method}-seed{seed}"


def _train(method: str, seed: int, out: Path, workers: int) -> None:
    """One training run in a process of its own, its lines copied to a log."""
    run_dir = _run_dir(out, method, seed)
    command = [sys.executable, "-m", "ltat_fast.train", "--method", method, "--seed", str(seed), "--out", str(run_dir)]
    command += [*FLAGS] + (["--resume"] if (run_dir / "config.json").exists() else [])
    # These networks are too small for more than one thread each; idle OpenMP threads would spin on the other's core.
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / f"{run_dir.name}.log"
    with (
        open(log_file, "w") as copy,
        subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as process,
    ):
        for line in _shown(process.stdout, copy):
            log.say(f"{run_dir.name:14} {line}")
    if process.returncode:
        raise UserError(f"{run_dir.name} ended with status {process.returncode}; see {log_file}")
    log.say(f"{run_dir.name:14} finished in {time.monotonic() - started:.0f} s")


def _shown(lines, copy) -> Iterator[str]:
    """Every line goes to the log; on to the terminal go those with numbers measured on the test set."""
    for line in lines:
        copy.write(line)
        copy.flush()
        if "test_clean" in line or " test set" in line:
            yield line.rstrip()


if __name__ == "__main__":
    main()
