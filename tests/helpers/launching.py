"""Training runs as processes of their own, one or two a run, to be killed, stopped and starved."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from helpers import train_runs

# Two epochs of a teacher and three of a student, twenty steps in all, saved after every one.
FLAGS = ("--dataset", "digits-lt", "--epochs", "3", "--teacher-epochs", "2", "--batch-size", "128")
FLAGS += ("--teacher-batch-size", "128", "--attack-steps", "1", "--eval-every", "2", "--limit-eval", "40")
FLAGS += ("--eval-attacks", "clean,pgd2", "--save-minutes", "1e-9")
WAIT = 400  # seconds for a run to end: compilation on a busy machine, and distributed.JOIN_TIMEOUT


def launch(out: Path, *flags: str, processes: int = 1, **options) -> list[subprocess.Popen]:
    """The processes of one run into ``out``: new, or resumed where there is something to resume."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    resume = ["--resume"] if (out / "config.json").exists() else []
    command = [sys.executable, "-m", "ltat_fast.train", "--out", str(out), *FLAGS, *flags, *resume]
    started = []
    for rank in range(processes):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=environment, **pipes, **options))
    return started


def kill(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.communicate()


@contextlib.contextmanager
def running(*args, **kwargs) -> Iterator[list[subprocess.Popen]]:
    """:func:`launch`, and nothing of it left behind, whatever the test ends with."""
    processes = launch(*args, **kwargs)
    try:
        yield processes
    finally:
        kill(processes)


def finish(out: Path, *flags: str, processes: int = 1, status: int = 0) -> str:
    """Let a run come to its end by itself; what its main process wrote to stderr."""
    with running(out, *flags, processes=processes) as started:
        said = [process.communicate(timeout=WAIT) for process in started]
        assert {process.returncode for process in started} == {status}, said
    return said[0][1]


def assert_same(out: Path, expected: Path) -> None:
    """The same metrics, scores and weights, to the last bit."""
    assert train_runs.outcome(out) == train_runs.outcome(expected)
    ours, theirs = train_runs.weights(out), train_runs.weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def wait_until(condition, processes: list[subprocess.Popen], seconds: float = 90) -> bool:
    """Look twice a millisecond until ``condition()``; False if a process or the time came to its end first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            return False
        time.sleep(0.0005)
    return True
