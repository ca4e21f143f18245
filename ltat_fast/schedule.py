"""Learning rates. Epochs count from 0 here; the published schedules count from 1."""

import math

from ltat_fast.errors import UserError

# The share of training after which the rate is a tenth of what it was, and whether the epoch that completes the share
# is itself the first at the lower rate.
DROPS = {
    "step": ((0.75, 0.9, 1.0), True),  # AT-BSL: epochs 75, 90 and 100 of 100
    "igdm": ((0.5, 0.75), False),  # the IGDM paper: epochs 101 and 151 of 200
    "rslad": ((215 / 300, 260 / 300, 285 / 300), False),  # and what it gives RSLAD: epochs 216, 261 and 286 of 300
}


def parse_schedule(kind: str) -> tuple[tuple[float, ...], bool] | None:
    """The entry of :data:`DROPS`, or its like from "0.5,0.8"; None for "onecycle". Raises UserError for others."""
    if kind == "onecycle":
        return None
    if kind in DROPS:
        return DROPS[kind]
    try:
        shares = tuple(float(share) for share in kind.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0 < share < 1 for share in shares):
        names = ", ".join([*DROPS, "onecycle"])
        raise UserError(
            f"--lr-schedule takes {names}, or shares of the epochs between 0 and 1 such as 0.5,0.8, not {kind}"
        )
    return shares, False


def first_drop(kind: str, epochs: int) -> int:
    """The first epoch, from 0, at a lowered rate, or 0 if there is none; of "onecycle" what it is of "step"."""
    return min(_drops("step" if kind == "onecycle" else kind, epochs), default=0)


def _drops(kind: str, epochs: int) -> list[int]:
    """The epochs, from 0, from which on the rate is a tenth of what it was before."""
    shares, itself = parse_schedule(kind)
    drops = [math.ceil(share * epochs - 1e-9) - itself for share in shares]
    return [drop for drop in drops if 0 < drop < epochs]  # the first epoch keeps the full rate


def learning_rate(kind: str, peak: float, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> float:
    """The rate of ``step`` (from 0) of ``epoch`` (from 0).

    "onecycle" is linear from a tenth to the peak over the first 30 % of steps, then linear to zero; the others divide
    by ten at each of their drops (:func:`parse_schedule`).
    """
    if kind != "onecycle":
        return peak * 0.1 ** sum(epoch >= drop for drop in _drops(kind, epochs))
    done, total = epoch * steps_per_epoch + step, epochs * steps_per_epoch
    warm = max(1, round(0.3 * total))
    if done < warm:
        return peak * (0.1 + 0.9 * done / warm)
    return peak * (total - done) / max(1, total - warm)
