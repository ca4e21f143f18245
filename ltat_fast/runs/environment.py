"""RUN/env.json: the machine, the package versions and the code revision that a result depends on."""

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from ltat_fast.ops import backend_info
from ltat_fast.runs.splits import Splits

PACKAGES = ("ltat-fast", "torch", "torchvision", "triton", "numpy", "pyautoattack")  # their versions change results


def describe_environment(device: torch.device, dtype: torch.dtype, data: Splits) -> dict:
    """The content of RUN/env.json: what it would take to see the same numbers again."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": str(dtype).removeprefix("torch."),
        "ops": {op: backends[device.type] for op, backends in backend_info().items()},
        "git": git_revision(),
        "index_hash": data.index_hash,
        "class_counts": data.counts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The commit of the code that is running, with "+" if it was changed since; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "") if commit.returncode == 0 else None
