"""Run the value tests of every kernel (cases_*.py) on the CPU in Triton's interpreter, and on a GPU if there is one.

Each file runs in its own process: Triton reads TRITON_INTERPRET when a kernel is defined, and an interpreted process
cannot compile.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = sorted(path.name for path in Path(__file__).parent.glob("cases_*.py"))


def run(case_file, interpret):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", case_file]
    result = subprocess.run(command, cwd=Path(__file__).parent, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    print(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case_file", CASES)
def test_interpreted(case_file):
    pytest.importorskip("triton")
    run(case_file, "1")


@pytest.mark.gpu
@pytest.mark.parametrize("case_file", CASES)
def test_on_the_gpu(case_file):
    run(case_file, "0")
