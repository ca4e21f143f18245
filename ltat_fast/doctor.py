"""Report which packages, devices and kernels this machine can use, and why not faster ones.

python -m ltat_fast.doctor [--brief]
"""

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from rich.table import Table

from ltat_fast import __version__, cli

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "PIL",
    "safetensors",
    "sklearn",
    "pyautoattack",
    "tyro",
    "rich",
    "tensorboard",
    "matplotlib",
)


@dataclass(frozen=True)
class Arguments:
    """Report which packages, devices and kernels this machine can use, and why not faster ones."""

    brief: bool = False
    """print only the backend of each op on the CPU, in one line"""


def main(argv: list[str] | None = None) -> int:
    """Print the report. Return exit status 1 if a required package is missing or broken, else 0."""
    arguments = cli.parse(Arguments, "python -m ltat_fast.doctor", argv)
    from ltat_fast.ops import backend_info
    from ltat_fast.runs.log import console, say

    if arguments.brief:
        say("; ".join(f"{op}: {backends['cpu']}" for op, backends in backend_info().items()))
        return 0
    usable = True
    table = Table("what", "state", show_lines=False)
    for name, state, ok in [*_packages(), *_machine()]:
        usable = usable and ok
        table.add_row(name, state)
    console.print(table)
    ops = Table("op", "on the CPU", "on CUDA")
    for op, backends in backend_info().items():
        ops.add_row(op, backends["cpu"], backends["cuda"])
    console.print(ops)
    return 0 if usable else 1


def _packages() -> Iterator[tuple[str, str, bool]]:
    """Yield name, state and whether the package can work with it, for Python and every required package."""
    yield "ltat-fast", __version__, True
    yield "python", f"{platform.python_version()} ({sys.executable})", sys.version_info >= (3, 10)
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
            yield name, str(getattr(module, "__version__", "installed")), True
        except ImportError as error:
            # Only GPUs need Triton.
            yield name, f"missing: {error}", name == "triton"
    try:
        from ltat_fast._torchvision import torchvision

        yield "torchvision", torchvision.__version__, True
    except (ImportError, RuntimeError) as error:
        yield "torchvision", f"does not load: {error}; install the release that belongs to this torch", False


def _machine() -> Iterator[tuple[str, str, bool]]:
    """Yield the same for the processors, the compilers and the C++ extension."""
    import torch

    from ltat_fast import _ext
    from ltat_fast.models.precision import cpu_has_bf16
    from ltat_fast.training.device import choose

    yield "CPU", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}", True
    yield "bf16 on the CPU", "in hardware" if cpu_has_bf16() else "emulated: --precision auto stays fp32", True
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield (
            "GPU",
            f"{torch.cuda.get_device_name()}, sm_{major}{minor}, {memory:.0f} GiB, CUDA {torch.version.cuda}",
            True,
        )
    else:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "no usable device or driver"
        yield "GPU", f"none: {reason}", True
    hardware = choose()
    yield "training would use", f"{hardware.device.type}, {hardware.dtype} ({hardware.why})", True
    compilers = {name: shutil.which(name) for name in (os.environ.get("CXX", "g++"), "nvcc", "ninja")}
    yield "compilers", ", ".join(f"{name}: {path or 'not found'}" for name, path in compilers.items()), True
    yield "C++ extension", "loaded" if _ext.HAS_EXT else f"not used: {_ext.WHY_NOT}", True


if __name__ == "__main__":
    raise SystemExit(main())
