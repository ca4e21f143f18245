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


def describe_environment(device: torch.device, dtype: torch.dtype, splits: Splits) -> dict:
    """Return the content of RUN/env.json: everything needed to get the same numbers again."""
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "gpu": gpu,
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": dtype_name(dtype),
        "ops": {op: backends[device.type] for op, backends in backend_info().items()},
        "git": git_revision(),
        "index_hash": splits.index_hash,
        "class_counts": splits.counts,
        "selected_on": splits.selected_on,
    } | ({"left_out_images": list(splits.left_out)} if splits.left_out else {})


def dtype_name(dtype: torch.dtype) -> str:
    """Return "float32" for ``torch.float32``: the name under which env.json records a precision."""
    return str(dtype).removeprefix("torch.")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Return the commit of the running code, with "+" if tracked files have changes. None outside a git checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    if commit.returncode != 0:
        return None
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")
