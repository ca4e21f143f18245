"""Short training runs for the tests of the entry points."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import torch
from PIL import Image

from ltat_fast.runs.records import read_metrics, read_steps
from ltat_fast.runs.weights import read_weights

SAFETY_NET = 1200  # seconds that any wait may take: against a test that never ends, whatever else the machine does
SIGNALLED = str(Path(__file__).with_name("signalled_train.py"))

# Teacher and student, 100 test images.
QUICK = ("--epochs", "3", "--teacher-epochs", "2", "--attack-steps", "3", "--eval-every", "2")
QUICK += ("--limit-eval", "100", "--eval-attacks", "clean,pgd20", "--alpha", "10")
FOLDER = ("--dataset", "imagefolder-lt", "--arch", "smallresnet", "--batch-size", "8", "--teacher-batch-size", "4")
FOLDER += ("--max-steps", "3", "--precision", "fp32", "--eval-attacks", "clean,pgd20", "--attack-steps", "2")


def start(*flags: str) -> subprocess.Popen:
    """Start ``python -m ltat_fast.train`` as a process of its own."""
    return _popen("-m", "ltat_fast.train", *flags)


def start_signalled(*flags: str, **environment: str) -> subprocess.Popen:
    """Start ``signalled_train.py`` as a process of its own. Its variables go into ``environment``."""
    return _popen(SIGNALLED, *flags, **environment)


def _popen(*command: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def killed_at_the_end(*processes: subprocess.Popen) -> Iterator[None]:
    """Leave none of ``processes`` behind, however the test ends."""
    try:
        yield
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Wait until ``process`` ends. Return what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=SAFETY_NET)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen) -> None:
    """Wait until ``condition()``, which stays true once it is. Fail if a process ends first."""
    deadline = time.monotonic() + SAFETY_NET
    while not condition():
        for process in processes:
            assert process.poll() is None, f"ended too early: {process.communicate()}"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_stopped(process: subprocess.Popen) -> None:
    """Wait until ``process`` has sent itself SIGSTOP."""
    wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED, process)


def train(*flags: str) -> int:
    """Run ``python -m ltat_fast.train`` in this process. Return its exit status."""
    return status_of("train", *flags)


def status_of(entry_point: str, *flags: str) -> int:
    """Run ``python -m ltat_fast.<entry_point>`` in this process. Return its exit status.

    The speed of the machine is measured on a small matrix product, which saves seconds per training run.
    """
    module, speed = (import_module(f"ltat_fast.{name}") for name in (entry_point, "training.speed"))
    with mock.patch.dict(speed.MATMUL_SIZE, cpu=64):
        try:
            return module.main(list(flags)) or 0
        except SystemExit as stopped:
            return stopped.code


def write_images(root: Path, names=("ant", "bee", "cow"), seed: int = 0) -> Path:
    """Write an image folder: the brightness of an image depends on its class, with noise on top."""
    rng = np.random.RandomState(seed)
    for split, counts in (("train", (24, 12, 8)), ("test", (5, 5, 5))):
        for label, (name, count) in enumerate(zip(names, counts, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(60 + 70 * label, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


NOT_RESULTS = {"seconds", "images_per_second", "share_of_ceiling", "memory_mib"}


def without_times(records: list[dict]) -> list[dict]:
    """Return records of epochs or of steps without what differs from run to run: times and memory."""
    return [{name: value for name, value in record.items() if name not in NOT_RESULTS} for record in records]


def outcome(run_dir: Path) -> dict:
    """Return all results of a run except its times."""
    result = {"eval": json.loads((run_dir / "eval.json").read_text())}
    for stage in ("", "teacher/"):
        result[f"{stage}metrics"] = without_times(read_metrics(run_dir / f"{stage}metrics.jsonl"))
        result[f"{stage}steps"] = without_times(read_steps(run_dir / f"{stage}steps.jsonl"))
    return result


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of all finished weights of a run, by file and name."""
    files = ("checkpoints/best", "checkpoints/last", "teacher/checkpoints/last")
    return {
        f"{file} {name}": tensor
        for file in files
        for name, tensor in read_weights(run_dir / f"{file}.safetensors")[0].items()
    }


def assert_same(run_dir: Path, expected: Path) -> None:
    """Assert that two runs have the same metrics, scores and weights, to the last bit."""
    assert outcome(run_dir) == outcome(expected)
    ours, theirs = weights(run_dir), weights(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
