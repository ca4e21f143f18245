"""Every reader of files gets damaged files: it returns the right content or raises UserError, without crash or hang.

``python -m pytest tests/fuzz -m slow -s`` tries for LTAT_FUZZ_MINUTES. A finding prints the command that repeats it.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

READERS = Path(__file__).with_name("readers.py")
MINUTES = float(os.environ.get("LTAT_FUZZ_MINUTES", "5"))
TARGETS = 10


def fuzz(seed: int, seconds: float, iterations: int) -> list[dict]:
    """Run ``readers.py`` in a process of its own, which a crash or a hang ends. Return its report, one dict per reader.

    seconds, iterations: the limits for each reader.
    """
    command = [sys.executable, "-X", "faulthandler", str(READERS), str(seed), str(seconds), str(iterations)]
    path = os.pathsep.join(filter(None, [str(READERS.parents[1]), os.environ.get("PYTHONPATH")]))  # of helpers
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{results[-1:]}\nafter that: exit status {done.returncode}\n{done.stderr[-3000:]}"
    for result in results:
        print("{target}: {tried:,} tried, {accepted:,} accepted, {refused:,} refused".format(**result))
        assert result["findings"] == [], f"python {READERS} {seed} {seconds} {iterations} {result['target']}"
    assert len(results) == TARGETS
    print(f"{sum(result['tried'] for result in results):,} files in all, seed {seed}")
    return results


def test_damaged_files_are_read_right_or_refused():
    for result in fuzz(seed=0, seconds=math.inf, iterations=150):
        assert result["tried"] == 150
        assert result["refused"] > 50  # otherwise the damage is too mild


@pytest.mark.slow
def test_many_damaged_files_are_read_right_or_refused():
    seed = int(os.environ.get("LTAT_FUZZ_SEED") or random.Random(time.time_ns()).randrange(2**31))
    fuzz(seed, MINUTES * 60 / TARGETS, 10**9)
