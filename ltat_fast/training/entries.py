"""What the records of an epoch and of some steps hold, and the line that the terminal shows for an epoch."""

import psutil
import torch

# Entries of a record of an epoch that its line on the terminal omits, or shows in another form.
NOT_PRINTED = {"epoch", "steps", "lr", "seconds", "images_per_second"}
NOT_PRINTED |= {"share_of_ceiling", "zero_gradients", "sign_disagreement"}


def means(totals: dict[str, float], since: dict[str, float] | None = None) -> dict[str, float]:
    """Return "steps", their number, and the mean of each part of the loss over the steps between two sums.

    totals, since: results of :meth:`TrainStep.totals` in one epoch; since is the earlier one, None the start.
    """
    since = since or {}
    steps = int(totals["steps"] - since.get("steps", 0))
    parts = {name: total for name, total in totals.items() if name not in ("steps", "first_bad")}
    return {"steps": steps} | {name: (total - since.get(name, 0.0)) / max(steps, 1) for name, total in parts.items()}


def speed(images: int, seconds: float) -> dict[str, float]:
    """Return the time and the speed of a record."""
    return {"seconds": round(seconds, 3), "images_per_second": round(images / max(seconds, 1e-9), 1)}


def memory(device: torch.device) -> dict[str, float]:
    """Return memory in MiB, without waiting for the device.

    On a GPU the highest values so far: of the tensors, and of what torch holds to put tensors into. On a CPU the
    resident memory of the process now.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_allocated_mib": round(allocated / 2**20, 1), "peak_reserved_mib": round(reserved / 2**20, 1)}
    return {"memory_mib": round(psutil.Process().memory_info().rss / 2**20, 1)}


def line(entry: dict, epochs: int) -> str:
    """Return the line that the terminal shows for the record of an epoch."""
    numbers = "  ".join(f"{name} {value:.4g}" for name, value in entry.items() if name not in NOT_PRINTED)
    rate = f"{entry['seconds']:.1f} s  {entry['images_per_second']:.0f} images/s"
    return f"{entry['epoch']:>3}/{epochs}  lr {entry['lr']:.4g}  {numbers}  {rate}"
