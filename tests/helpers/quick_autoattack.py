"""AutoAttack in a second instead of minutes: the four standard attacks with a fraction of their steps."""

import pyautoattack

from ltat_fast.attacks.apgd import APGD
from ltat_fast.attacks.fab import FAB
from ltat_fast.attacks.square import Square

STEPS, QUERIES = 8, 30


class QuickAutoAttack(pyautoattack.AutoAttack):
    """The package."""

    def _set_version(self, version="standard"):
        super()._set_version(version)
        self.square.n_queries = QUERIES
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = STEPS


def quick_searches(ball, steps=STEPS, queries=QUERIES):
    """Ours: in place of :func:`ltat_fast.attacks.autoattack.searches`."""
    return {
        "apgd-ce": APGD(ball, "ce", steps),
        "apgd-t": APGD(ball, "dlr-targeted", steps),
        "fab-t": FAB(ball, steps),
        "square": Square(ball, queries),
    }
