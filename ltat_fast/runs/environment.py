"""RUN/env.json: the machine, the package versions, the code revision and the data that a result depends on."""

import datetime
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ltat_fast.errors import UserError
from ltat_fast.files import write_json
from ltat_fast.ops import backend_info
from ltat_fast.runs.json_object import JsonObject
from ltat_fast.runs.splits import Splits
from ltat_fast.runs.weights import state_digest

PACKAGES = ("ltat-fast", "torch", "torchvision", "triton", "numpy", "pyautoattack")  # their versions change results


def describe_environment(
    device: torch.device, dtype: torch.dtype, splits: Splits, teacher: nn.Module | None = None
) -> dict:
    """Return the content of RUN/env.json: everything needed to get the same numbers again.

    teacher: the network of ``--teacher``.
    """
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
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
        "data": splits.digests | ({"teacher": state_digest(teacher)} if teacher else {}),
    } | ({"left_out_images": list(splits.left_out)} if splits.left_out else {})


def refuse_other_data(file: Path, environment: dict) -> None:
    """Raise UserError if the data of ``environment`` are not those with which the run of the env.json ``file`` began.

    Runs of earlier versions did not record their data and are not checked.
    """
    if not file.exists():
        return
    before = JsonObject.load(file).object("data").content
    changed = [name for name, now in environment["data"].items() if before.get(name, now) != now]
    if changed:
        raise UserError(
            f"cannot resume {file.parent}: since its start the {', '.join(changed)} changed; restore what the run "
            "began with, or start a new run in another folder"
        )


def record_environment(file: Path, environment: dict) -> None:
    """Write env.json. If the run was started before, its first environment stays, and "resumed" lists later ones."""
    if file.exists():
        first = JsonObject.load(file)
        earlier = [later.content for later in first.list_of_objects("resumed")] if "resumed" in first.content else []
        same = ("data", "class_counts", "index_hash", "selected_on", "left_out_images")
        later = {name: value for name, value in environment.items() if name not in same}
        environment = environment | first.content | {"resumed": [*earlier, later]}
    write_json(file, environment)


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
