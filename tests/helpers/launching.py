"""Start the processes of tests: a program in two processes, or one small LTAT run to kill, to stop and to starve."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers import train_runs

# Two epochs of a teacher and three of a student, twenty steps in all, saved after each step.
FLAGS = ("--dataset", "digits-lt", "--epochs", "3", "--teacher-epochs", "2", "--batch-size", "128")
FLAGS += ("--teacher-batch-size", "128", "--attack-steps", "1", "--eval-every", "2", "--limit-eval", "40")
FLAGS += ("--eval-attacks", "clean,pgd2", "--save-minutes", "1e-9", "--log-every", "3")


def in_two_processes(*command: str) -> subprocess.CompletedProcess:
    """Run the Python program ``command``, a file or ``-m`` and a module, in two processes that talk through gloo."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [tests, os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run(
        launch, capture_output=True, text=True, env=environment, timeout=train_runs.SAFETY_NET, check=False
    )


def command_line(out: Path, *flags: str) -> list[str]:
    """Return the flags of the run in ``out``, with ``--resume`` if it has begun."""
    resume = ["--resume"] if (out / "config.json").exists() else []
    return ["--out", str(out), *FLAGS, *flags, *resume]


def launch(out: Path, *flags: str, processes: int = 1, **environment: str) -> list[subprocess.Popen]:
    """Start or resume the run in ``out``. environment: as in ``signalled_train.py``."""
    command = command_line(out, *flags)
    if processes == 1:
        return [train_runs.start_signalled(*command, **environment)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        train_runs.start_signalled(*command, RANK=str(rank), LOCAL_RANK=str(rank), **world, **environment)
        for rank in range(processes)
    ]


@contextlib.contextmanager
def running(*args, **kwargs) -> Iterator[list[subprocess.Popen]]:
    """:func:`launch` processes, and kill those that are left at the end."""
    processes = launch(*args, **kwargs)
    with train_runs.killed_at_the_end(*processes):
        yield processes


def finish(out: Path, *flags: str, processes: int = 1, **environment: str) -> None:
    """Start or resume the run in processes of its own, and let it finish."""
    with running(out, *flags, processes=processes, **environment) as started:
        said = [process.communicate(timeout=train_runs.SAFETY_NET) for process in started]
        assert {process.returncode for process in started} == {0}, said


def train(out: Path, *flags: str) -> int:
    """Start or resume the run in this process. Return its exit status."""
    return train_runs.train(*command_line(out, *flags))
