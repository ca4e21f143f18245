"""Short training runs for the tests of the entry points."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ltat_fast.runs import log
from ltat_fast.runs.weights import read_weights

# Ten seconds with start-up: teacher and student, 100 test images.
QUICK = ("--epochs", "3", "--teacher-epochs", "2", "--attack-steps", "3", "--eval-every", "2")
QUICK += ("--limit-eval", "100", "--eval-attacks", "clean,pgd20", "--alpha", "10")
FOLDER = ("--dataset", "imagefolder-lt", "--arch", "smallresnet", "--batch-size", "8", "--teacher-batch-size", "4")
FOLDER += ("--max-steps", "3", "--precision", "fp32", "--eval-attacks", "clean,pgd20", "--attack-steps", "2")


def start(*flags: str) -> subprocess.Popen:
    """``python -m ltat_fast.train`` as a process of its own."""
    command = [sys.executable, "-m", "ltat_fast.train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """Wait for it; what it wrote to stdout and stderr."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, f"exit status {process.returncode}\n{out}\n{err}"
    return out, err


def train(*flags: str) -> int:
    """The exit status of ``python -m ltat_fast.train``, run in this process."""
    return status_of("train", *flags)


def status_of(entry_point: str, *flags: str) -> int:
    """The exit status of ``python -m ltat_fast.<entry_point>``, run in this process."""
    from importlib import import_module

    try:
        return import_module(f"ltat_fast.{entry_point}").main(list(flags)) or 0
    except SystemExit as stopped:
        return stopped.code


def write_images(root: Path, names=("ant", "bee", "cow"), seed: int = 0) -> Path:
    """An image folder: noise around a brightness that tells the class."""
    rng = np.random.RandomState(seed)
    for split, counts in (("train", (24, 12, 8)), ("test", (5, 5, 5))):
        for label, (name, count) in enumerate(zip(names, counts, strict=True)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(60 + 70 * label, 30, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


TIMES = {"seconds", "images_per_second", "share_of_ceiling"}


def outcome(run_dir: Path) -> dict:
    """All that a run says, but for its times."""
    result = {"eval": json.loads((run_dir / "eval.json").read_text())}
    for stage in ("", "teacher/"):
        records = log.read_metrics(run_dir / f"{stage}metrics.jsonl")
        result[f"{stage}metrics"] = [{k: v for k, v in r.items() if k not in TIMES} for r in records]
    return result


def weights(run_dir: Path) -> dict:
    files = ("checkpoints/best", "checkpoints/last", "teacher/checkpoints/last")
    return {
        f"{file} {name}": tensor
        for file in files
        for name, tensor in read_weights(run_dir / f"{file}.safetensors")[0].items()
    }
