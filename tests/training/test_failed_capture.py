"""A run whose CUDA graph cannot be captured still finishes (emulated: there is no GPU in these tests)."""

import json
import os
import subprocess
import sys
from pathlib import Path

FLAGS = ("--method", "pgd-at", "--epochs", "1", "--max-steps", "2", "--attack-steps", "1")
FLAGS += ("--limit-eval", "20", "--eval-attacks", "clean")
SCRIPT = Path(__file__).with_name("train_with_failing_capture.py")


def train(out: Path, how: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--out", str(out), *FLAGS, *flags]
    environment = os.environ | {"FAIL": how, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def finished(out: Path) -> bool:
    return set(json.loads((out / "eval.json").read_text())) == {"best", "last"}


def test_a_failed_capture_continues_in_a_new_process(tmp_path):
    done = train(tmp_path / "run", "raise")
    assert done.returncode == 0, done.stderr
    assert "ValueError: .item() in the captured part" in done.stdout
    assert "a new process continues with --compile step" in done.stdout
    assert finished(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["compile"] == "step"


def test_a_process_that_is_killed_in_a_capture_is_resumed_without_it(tmp_path):
    out = tmp_path / "run"
    assert train(out, "kill").returncode == -9
    assert (out / ".capturing").exists()
    done = train(out, "kill", "--resume")
    assert done.returncode == 0, done.stderr
    assert finished(out)
