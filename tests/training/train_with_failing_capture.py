"""``python -m ltat_fast.train`` on a CPU, with a backend "graph" whose capture fails as it does in torch 2.11.

The run folder must end up with a finished run of another process. With FAIL=kill the process is killed instead, inside
the capture.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.cuda_graphs import emulate_failed_capture
from ltat_fast import train
from ltat_fast.errors import EXIT_GRAPH_FAILED
from ltat_fast.training import backend
from ltat_fast.training.step import TrainStep

eager_step = TrainStep.__call__


def step(self, x, y, **arguments):
    if self.backend == "graph":
        if os.environ["FAIL"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        emulate_failed_capture()
    eager_step(self, x, y, **arguments)


def candidates(wanted, x, marker):
    """As on a GPU."""
    if wanted == "auto":
        wanted = "graph"
    return [] if wanted == "graph" and marker.exists() else {"graph": ["graph"]}.get(wanted, [])


TrainStep.__call__ = step
backend._candidates = candidates

if (status := train.main()) == EXIT_GRAPH_FAILED:
    train.continue_without_graph()
raise SystemExit(status)
