"""Free memory and disk space, and the choice where the images of a run stay."""

import os
import shutil
from pathlib import Path

import psutil
import torch

from ltat_fast.errors import UserError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None

CGROUPS = Path("/sys/fs/cgroup")
"""where the kernel shows the control groups, which limit the memory of containers and jobs"""
OWN_CGROUP = Path("/proc/self/cgroup")
"""names the control group of this process"""


def require_memory(needed: int) -> None:
    """Raise UserError if ``needed`` bytes of decoded images, which no disk can hold, do not fit into the memory."""
    if needed > (free := free_memory()):
        raise UserError(
            f"these images need {gib(needed)}: no disk has room for them, and {gib(free)} of memory is free; "
            "free some disk space, or use a smaller --image-size or fewer images"
        )


def choose_placement(asked: str, needed: int, device: torch.device) -> tuple[str, str]:
    """Return where the images of a run stay, "device" or "stream", and the line that tells the user.

    asked: "auto", "device" or "stream". auto chooses the device if the images fill at most half of its free memory.
    needed: bytes of the images.

    Raises:
        UserError: "device" was asked for, and its free memory is too small.
    """
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:  # the processes of a run on this machine share its memory
        free, where = free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "in memory"
    if asked == "device" and needed > free:
        raise UserError(
            f"--data-placement device: the images need {gib(needed)}, and {gib(free)} is free {where}; use stream or "
            "auto, a smaller --image-size or fewer images"
        )
    placement = asked if asked != "auto" else "device" if 2 * needed <= free else "stream"
    if placement == "device":
        return placement, f"the images stay {where} ({gib(needed)} of {gib(free)} free)"
    return placement, f"the images ({gib(needed)}) are streamed; {gib(free)} is free {where}"


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


def disk_usage(folder: Path) -> int:
    """Return the bytes that the files in ``folder`` take on the disk; holes in them take none. Raises OSError."""
    return sum(file.stat().st_blocks * 512 for file in folder.iterdir())


def gib(size: int) -> str:
    """Format a number of bytes: "26.1 GiB"."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def _free_in_cgroups() -> list[int]:
    """Return the bytes left in the control group of this process and in each group above it that has a limit."""
    free = []
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines()]
    except OSError:  # no Linux
        return free
    for _, controllers, path in lines:
        if controllers == "":  # version 2
            root, limit_file, used_file, cached = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):  # version 1
            root, limit_file, used_file = CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        group = root / path.strip().lstrip("/")
        for folder in (group, *group.parents):
            try:
                limit, used = int((folder / limit_file).read_text()), int((folder / used_file).read_text())
                stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such file in the highest group; no limit: "max"
                continue
            free.append(limit - used + int(stats.get(cached, 0)))  # the kernel takes cached files back
    return free
