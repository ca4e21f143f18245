"""Start several training runs, each in its own process: as many at a time as there are CPU cores, or one on a GPU."""

import contextlib
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltat_fast import config as configuration
from ltat_fast import files
from ltat_fast.attacks.by_name import parse_attacks
from ltat_fast.config import Config
from ltat_fast.errors import EXIT_INTERRUPTED, Interrupted, UserError
from ltat_fast.flags import parse_args
from ltat_fast.runs import log
from ltat_fast.runs.finished import FinishedRun
from ltat_fast.runs.results import CHECKPOINTS
from ltat_fast.signals import handle_signals


@dataclass(frozen=True)
class Job:
    """One run of ``python -m ltat_fast.train``."""

    run_dir: Path
    flags: tuple[str, ...]

    @property
    def begun(self) -> bool:
        return (self.run_dir / "config.json").exists()

    @property
    def command(self) -> list[str]:
        resume = ["--resume"] if self.begun else []
        return [sys.executable, "-m", "ltat_fast.train", "--out", str(self.run_dir), *self.flags, *resume]

    @property
    def log_file(self) -> Path:
        return self.run_dir.parent / f"{self.run_dir.name}.log"


def split_flags(argv: Sequence[str] | None) -> tuple[list[str], tuple[str, ...]]:
    """Split ``argv`` (default: ``sys.argv``) into the flags of the command and the flags after ``--`` for every run.

    Raises UserError for flags after ``--`` that must differ from run to run.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    own, forwarded = argv[:split], tuple(argv[split + 1 :])
    if given := {flag.partition("=")[0] for flag in forwarded} & {"--seed", "--out", "--resume"}:
        names = ", ".join(sorted(given))
        raise UserError(f"{names} cannot stand after --, because each run gets its own: use --seeds and --out")
    return own, forwarded


def repetitions(stem: Path, flags: Sequence[str], seeds: Iterable[int], extra: Sequence[str] = ()) -> tuple[Job, ...]:
    """One run per seed, in ``<stem>-seed<seed>``; a seed named twice counts once. ``extra`` overrides ``flags``."""
    return tuple(
        Job(stem.with_name(f"{stem.name}-seed{seed}"), (*flags, "--seed", str(seed), *extra))
        for seed in dict.fromkeys(seeds)
    )


def outstanding(jobs: Sequence[Job]) -> tuple[list[Job], list[Job]]:
    """The jobs still to be run, and the jobs that are refused because their folder holds a run with other settings.

    Prints why a job is refused. ``train --resume`` alone would not notice every such run, because it takes
    missing flags from the run itself.
    """
    todo, refused = [], []
    for job in jobs:
        if (reason := conflict(job)) is not None:
            log.say(f"{job.run_dir.name} is kept as it is and not used: {reason}")
            refused.append(job)
        elif not is_finished(job):
            todo.append(job)
    return todo, refused


def conflict(job: Job) -> str | None:
    """Return why the run in the folder of ``job`` does not fit ``job``; None if it fits or there is no run."""
    if not job.begun:
        return None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            asked = parse_args(["--out", str(job.run_dir), *job.flags])
        changed = configuration.differences(*configuration.load(job.run_dir), *asked)
    except SystemExit:
        return f"python -m ltat_fast.train does not take {shlex.join(job.flags)}"
    except UserError as error:
        return str(error)
    return f"{job.run_dir} was started with other settings: {', '.join(changed)}" if changed else None


def is_finished(job: Job) -> bool:
    """Whether the run of ``job`` is trained, and evaluated under all attacks in its settings."""
    try:
        run = FinishedRun.load(job.run_dir)
    except UserError:
        return False
    attacks = parse_attacks(run.config.eval_attacks or Config.eval_attacks)
    return all(run.evaluation.result(which, attack) for which in CHECKPOINTS for attack in attacks)


class Children:
    """The processes of a study, which get its signals. Each is in a session of its own, so that Ctrl-C comes once."""

    def __init__(self):
        self.stopped_by: str | None = None
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.RLock()  # reentrant, because a second signal can interrupt the first handler

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen | None:
        """Start a process, or return None if a signal arrived."""
        with self._lock:
            if self.stopped_by is not None:
                return None
            self._running.add(process := subprocess.Popen(command, start_new_session=True, **options))
            return process

    def ended(self, process: subprocess.Popen) -> None:
        with self._lock:
            self._running.discard(process)

    def stop(self, number: int, frame: object) -> None:
        """Handle a signal: the first one lets every process save its state, a second Ctrl-C does not."""
        with self._lock:
            again = self.stopped_by is not None and number == signal.SIGINT
            self.stopped_by = signal.Signals(number).name
            for process in self._running:
                process.send_signal(signal.SIGINT if again else signal.SIGTERM)


def train_all(
    jobs: Sequence[Job], show: Callable[[str], bool] = lambda line: False, study: Sequence[Job] = ()
) -> dict[Job, int]:
    """Run every job, resume those that were started before, and return the exit status of each.

    show: whether to print a line of a run on the terminal; errors are always printed. Every line goes to the job's log.
    study: all jobs of the study, finished ones too. Their number decides how many threads a run gets, so that a study
    that is started again gives the same number. A run that was started before keeps its own.

    Raises:
        UserError: a log cannot be written.
        Interrupted: a signal (SIGTERM, SIGINT, SIGUSR1) arrived. Every run has saved its state and ended.
    """
    if not jobs:
        return {}
    cores = os.cpu_count() or 1
    workers = 1 if torch.cuda.is_available() else min(max(len(jobs), len(study)), cores)
    # Concurrent runs share the cores: idle OpenMP threads of one run would spin on the cores of another.
    environment = os.environ | {"OMP_NUM_THREADS": str(cores // workers)}
    width = max(len(job.run_dir.name) for job in jobs)
    children = Children()

    def train(job: Job) -> int:
        started = time.monotonic()
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        with (
            files.oserror_as_user_error(job.log_file),
            open(job.log_file, "a", buffering=1) as copy,  # opened before any work, because it may fail
        ):
            process = children.start(job.command, env=environment, **pipes)
            if process is None:
                return EXIT_INTERRUPTED
            with process:
                for line in process.stdout:
                    copy.write(line)
                    if show(line) or line.startswith("ltat_fast: "):
                        log.say(f"{job.run_dir.name:{width}} {line.rstrip()}")
            children.ended(process)
        how = f"ended with status {process.returncode}, see {job.log_file}" if process.returncode else "finished"
        log.say(f"{job.run_dir.name:{width}} {how} after {time.monotonic() - started:.0f} s")
        return process.returncode

    for folder in {job.log_file.parent for job in jobs}:
        files.make_folder(folder)
    log.say(f"{len(jobs)} runs, {min(workers, len(jobs))} at a time")
    with handle_signals(children.stop), ThreadPoolExecutor(workers) as pool:
        statuses = dict(zip(jobs, pool.map(train, jobs), strict=True))
    if children.stopped_by is not None:
        raise Interrupted(f"stopped by {children.stopped_by}; its runs saved their state")
    return statuses
