"""Several training runs, each in a process of its own: as many at once as the machine has cores, or one on a GPU."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ltat_fast.attacks.evaluation import parse_attacks
from ltat_fast.config import Config
from ltat_fast.engine import log, tables
from ltat_fast.errors import UserError


@dataclass(frozen=True)
class Job:
    """One run of ``python -m ltat_fast.train``."""

    run_dir: Path
    flags: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        resume = ["--resume"] if (self.run_dir / "config.json").exists() else []
        return [sys.executable, "-m", "ltat_fast.train", "--out", str(self.run_dir), *self.flags, *resume]

    @property
    def log_file(self) -> Path:
        return self.run_dir.parent / f"{self.run_dir.name}.log"


def split_flags(argv: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """The command's own flags (of ``sys.argv`` if None), and those behind ``--``, which go to every run."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    return argv[:split], tuple(argv[split + 1 :])


def is_finished(job: Job) -> bool:
    """Whether the run of ``job`` has been trained and evaluated under all the attacks it is to be evaluated under."""
    try:
        config, results = tables.load_results(job.run_dir)
    except UserError:
        return False
    attacks = parse_attacks(config.get("eval_attacks", Config.eval_attacks))
    return all(attack in results.get(which, {}) for which in ("best", "last") for attack in attacks)


def train_all(jobs: Sequence[Job], show: Callable[[str], bool] = lambda line: False) -> dict[Job, int]:
    """Run every job, resuming those begun before; the exit status of each, by job.

    show: which lines of a run go on to the terminal; all of them go to the job's log.
    """
    workers = 1 if torch.cuda.is_available() else max(1, min(len(jobs), os.cpu_count() or 1))
    # Runs side by side share the cores: idle OpenMP threads of one would spin on those of the other.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    width = max((len(job.run_dir.name) for job in jobs), default=0)

    def train(job: Job) -> int:
        started = time.monotonic()
        job.log_file.parent.mkdir(parents=True, exist_ok=True)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with (
            open(job.log_file, "a") as copy,
            subprocess.Popen(job.command, env=os.environ | {"OMP_NUM_THREADS": threads}, **pipes) as process,
        ):
            for line in process.stdout:
                copy.write(line)
                copy.flush()
                if show(line):
                    log.say(f"{job.run_dir.name:{width}} {line.rstrip()}")
        how = f"ended with status {process.returncode}, see {job.log_file}" if process.returncode else "finished"
        log.say(f"{job.run_dir.name:{width}} {how} after {time.monotonic() - started:.0f} s")
        return process.returncode

    log.say(f"{len(jobs)} runs, {workers} at a time")
    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(jobs, pool.map(train, jobs), strict=True))
