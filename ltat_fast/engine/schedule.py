"""Learning rates. Epochs count from 0 here; the published schedules count from 1."""

import math

# The share of training after which the rate is a tenth of what it was, and whether the epoch that completes the share
# is itself the first at the lower rate.
DROPS = {
    "step": ((0.75, 0.9, 1.0), True),  # AT-BSL: epochs 75, 90 and 100 of 100
    "igdm": ((0.5, 0.75), False),  # the IGDM paper: epochs 101 and 151 of 200
    "rslad": ((215 / 300, 260 / 300, 285 / 300), False),  # and what it gives RSLAD: epochs 216, 261 and 286 of 300
}


def first_drop(kind: str, epochs: int) -> int:
    """The first epoch, from 0, at a lowered rate, or 0 if there is none; of "onecycle" what it is of "step"."""
    return min(_drops(kind if kind in DROPS else "step", epochs), default=0)


def _drops(kind: str, epochs: int) -> list[int]:
    """The epochs, from 0, from which on the rate is a tenth of what it was before."""
    shares, itself = DROPS[kind]
    drops = [math.ceil(share * epochs - 1e-9) - itself for share in shares]
    return [drop for drop in drops if 0 < drop < epochs]  # the first epoch keeps the full rate


def learning_rate(kind: str, peak: float, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> float:
    """The rate of ``step`` (from 0) of ``epoch`` (from 0).

    "step", "igdm" and "rslad" divide by ten at each of their :data:`DROPS`; "onecycle" is linear from a tenth to the
    peak over the first 30 % of steps, then linear to zero.
    """
    if kind != "onecycle":
        return peak * 0.1 ** sum(epoch >= drop for drop in _drops(kind, epochs))
    done, total = epoch * steps_per_epoch + step, epochs * steps_per_epoch
    warm = max(1, round(0.3 * total))
    if done < warm:
        return peak * (0.1 + 0.9 * done / warm)
    return peak * (total - done) / max(1, total - warm)
