"""``python -m ltat_fast.train`` with little memory left: from the start of the steps, or of an evaluation.

LIMIT_AT: "step" or "evaluation". LIMIT_MIB: the memory that is left then, in MiB (RLIMIT_AS).
"""

import os
import resource
import sys
from pathlib import Path

from ltat_fast.train import main
from ltat_fast.training import evaluation, fit, speed

PLACES = {"step": (fit, "choose_backend"), "evaluation": (evaluation, "evaluate")}


def limit() -> None:
    """Let the process map at most LIMIT_MIB more than it has mapped."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(os.environ["LIMIT_MIB"]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    speed.MATMUL_SIZE["cpu"] = 64
    module, name = PLACES[os.environ["LIMIT_AT"]]
    original = getattr(module, name)

    def limited(*args, **kwargs):
        setattr(module, name, original)
        limit()
        return original(*args, **kwargs)

    setattr(module, name, limited)
    raise SystemExit(main(sys.argv[1:]))
