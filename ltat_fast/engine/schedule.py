"""Learning rates. Epochs count from 0 here; the published schedules count from 1."""

import math

# Share of training after which the rate is a tenth of what it was, as AT-BSL: epochs 75, 90 and 100 of 100.
DROPS = (0.75, 0.9, 1.0)


def first_drop(epochs: int) -> int:
    """The first epoch, from 0, at a lowered rate of the "step" schedule."""
    return max(0, math.ceil(DROPS[0] * epochs) - 1)


def learning_rate(kind: str, peak: float, epoch: int, step: int, epochs: int, steps_per_epoch: int) -> float:
    """The rate of ``step`` (from 0) of ``epoch`` (from 0).

    "step": 0.1 for e < 75, 0.01 for 75 <= e < 90, 0.001 for 90 <= e < 100, 0.0001 for e = 100, stretched to
    ``epochs``. "onecycle": linear from a tenth to the peak over the first 30 % of steps, then linear to zero.
    """
    if kind == "step":
        # A one-epoch run is all "last epoch": it keeps the full rate.
        drops = sum(epoch + 1 >= math.ceil(share * epochs) for share in DROPS) if epochs > 1 else 0
        return peak * 0.1**drops
    done, total = epoch * steps_per_epoch + step, epochs * steps_per_epoch
    warm = max(1, round(0.3 * total))
    if done < warm:
        return peak * (0.1 + 0.9 * done / warm)
    return peak * (total - done) / max(1, total - warm)
