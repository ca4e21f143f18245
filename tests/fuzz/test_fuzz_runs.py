"""Every command works on, or refuses in one sentence, a run folder in which one file lies with a checksum that fits.

``python -m pytest tests/fuzz/test_fuzz_runs.py -m slow -s`` tries for LTAT_FUZZ_MINUTES.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("run_files.py")
MINUTES = float(os.environ.get("LTAT_FUZZ_MINUTES", "5"))


def fuzz(run: Path, seed: int, seconds: float, iterations: int) -> dict:
    """Run ``run_files.py`` in a process of its own, which a crash ends. Return its report."""
    path = os.pathsep.join(filter(None, [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-X", "faulthandler", str(PROGRAM), str(run), *map(str, (seed, seconds, iterations))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{result['tried']:,} commands, seed {seed}: {result['ends']}")
    assert result["findings"] == [], f"python {' '.join(command[3:])}\n" + "\n".join(result["findings"])
    return result


def test_run_files_that_lie_are_used_or_refused(digits_run):
    result = fuzz(digits_run, seed=0, seconds=1000, iterations=8)
    refused = sum(ends.get("2", 0) for ends in result["ends"].values())
    assert 1 <= refused < result["tried"] == 8


@pytest.mark.slow
def test_many_run_files_that_lie_are_used_or_refused(digits_run):
    seed = int(os.environ.get("LTAT_FUZZ_SEED") or random.Random(time.time_ns()).randrange(2**31))
    fuzz(digits_run, seed, MINUTES * 60, 10**9)
