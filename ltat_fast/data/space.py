"""Free memory and disk space, asked before images are decoded."""

import shutil
from pathlib import Path

import psutil

from ltat_fast.errors import UserError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

CGROUPS = Path("/sys/fs/cgroup")
"""where the kernel shows the control groups of version 2, which limit the memory of containers and jobs"""
OWN_CGROUP = Path("/proc/self/cgroup")
"""names the control group of this process"""


def require_memory(needed: int) -> None:
    """Raise UserError if ``needed`` bytes of decoded images do not fit into the free memory."""
    if needed > (free := free_memory()):
        raise UserError(
            f"these images need {gib(needed)} of memory, and {gib(free)} is free: use a smaller --image-size or fewer "
            "images"
        )


def free_memory() -> int:
    """Return the bytes that this process can still allocate, under the limits of its control group and of ulimit."""
    free = [psutil.virtual_memory().available, *_free_in_cgroups()]
    if resource is not None and (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
        free.append(limit - psutil.Process().memory_info().vms)
    return max(0, min(free))


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of ``folder``, which need not exist yet. Raises OSError."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def gib(size: int) -> str:
    """Format a number of bytes: "26.1 GiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _free_in_cgroups() -> list[int]:
    """Return the bytes left in the control group of this process and in each group above it that has a limit."""
    free = []
    try:
        own = next(line for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
        group = CGROUPS / own[3:].strip().lstrip("/")
    except (OSError, StopIteration):  # no Linux, or version 1 of the control groups
        return free
    for folder in (group, *group.parents):
        try:
            limit, used = int((folder / "memory.max").read_text()), int((folder / "memory.current").read_text())
            stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such file in the highest group; no limit: "max"
            continue
        free.append(limit - used + int(stats.get("inactive_file", 0)))  # the kernel takes cached files back
    return free
