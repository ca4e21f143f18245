"""The functions registered for CUDA, run on the CPU by Triton's interpreter: what lies between an op and its launcher.

(The kernels themselves: tests/kernels.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("part", ["pgd", "balanced_softmax_kl"])
def test_interpreted(part):
    pytest.importorskip("triton", reason="Triton is not installed")
    # in a process of its own: the interpreter is chosen when Triton is imported
    ran = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "interpreted_glue.py"), part],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
