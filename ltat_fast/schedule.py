"""Learning rate schedules. Epochs count from 0 here and from 1 in the papers."""

import math

from ltat_fast.errors import UserError

# The shares of the epochs after which the rate is divided by 10. The bool says whether the epoch that completes a share
# already has the lower rate; otherwise the next epoch is the first with the lower rate.
DROPS = {
    "step": ((0.75, 0.9, 1.0), True),  # AT-BSL: epochs 75, 90 and 100 of 100
    "igdm": ((0.5, 0.75), False),  # IGDM paper: epochs 101 and 151 of 200
    "rslad": ((215 / 300, 260 / 300, 285 / 300), False),  # IGDM paper, for RSLAD: epochs 216, 261 and 286 of 300
}


def parse_schedule(kind: str) -> tuple[tuple[float, ...], bool] | None:
    """Return the entry ``kind`` of :data:`DROPS`, or such an entry for shares like "0.5,0.8"; None for "onecycle".

    Raises UserError if ``kind`` is no schedule.
    """
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
    """Return the first epoch, from 0, with a lower rate, or 0 if there is none. "onecycle" counts as "step"."""
    return min(_drops("step" if kind == "onecycle" else kind, epochs), default=0)


def _drops(kind: str, epochs: int) -> list[int]:
    """Return the epochs, from 0, at whose start the rate is divided by 10."""
    shares, completing_epoch_drops = parse_schedule(kind)
    earlier = 1 if completing_epoch_drops else 0
    drops = [math.ceil(share * epochs - 1e-9) - earlier for share in shares]
    return [drop for drop in drops if 0 < drop < epochs]  # the first epoch keeps the full rate


def learning_rate(kind: str, peak: float, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> float:
    """Return the learning rate of ``step`` of ``epoch``, both from 0.

    "onecycle" increases linearly from a tenth of the peak to the peak over the first 30 % of the steps, then decreases
    linearly to zero. Every other schedule starts at the peak and divides by 10 at each drop (:data:`DROPS`).
    """
    if kind != "onecycle":
        return peak * 0.1 ** sum(epoch >= drop for drop in _drops(kind, epochs))
    done, total = epoch * steps_per_epoch + step, epochs * steps_per_epoch
    warmup = max(1, round(0.3 * total))
    if done < warmup:
        return peak * (0.1 + 0.9 * done / warmup)
    return peak * (total - done) / max(1, total - warmup)
