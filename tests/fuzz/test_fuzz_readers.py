"""Every reader of files, given damaged ones: the right content or a UserError, and never a crash, a hang or gigabytes.

``python -m pytest tests/fuzz -m slow -s`` tries for LTAT_FUZZ_MINUTES; a finding names what makes it again.
"""

import json
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
    """What ``readers.py`` reports, in a process of its own: a crash or a hang ends that one."""
    command = [sys.executable, "-X", "faulthandler", str(READERS), str(seed), str(seconds), str(iterations)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{results[-1:]}\nafter that: exit status {done.returncode}\n{done.stderr[-3000:]}"
    for result in results:
        print("{target}: {tried:,} tried, {accepted:,} accepted, {refused:,} refused".format(**result))
        assert result["findings"] == [], f"python {READERS} {seed} {seconds} {iterations} {result['target']}"
    assert len(results) == TARGETS
    print(f"{sum(result['tried'] for result in results):,} files in all, seed {seed}")
    return results


def test_damaged_files():
    for result in fuzz(seed=0, seconds=60, iterations=150):
        assert result["tried"] == 150
        assert result["refused"] > 50  # else the damage is too mild to say anything


@pytest.mark.slow
def test_damaged_files_for_long():
    seed = int(os.environ.get("LTAT_FUZZ_SEED") or random.Random(time.time_ns()).randrange(2**31))
    fuzz(seed, MINUTES * 60 / TARGETS, 10**9)
