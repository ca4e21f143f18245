"""Two gloo processes train as one: the same losses, weights and scores as a single process on the same batches."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from distributed_worker import main as train_and_evaluate

from helpers import train_runs
from helpers.launching import in_two_processes
from ltat_fast.runs.records import StageLog

WORKER = Path(__file__).with_name("distributed_worker.py")
TRAIN = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "4", "--batch-size", "32")
TRAIN += ("--eval-attacks", "clean,pgd20", "--limit-eval", "60")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[int, dict]:
    """What one process (this one) and two processes end with."""
    folder = tmp_path_factory.mktemp("distributed")
    train_and_evaluate(folder / "1.pt")
    done = in_two_processes(str(WORKER), str(folder / "2.pt"))
    assert done.returncode == 0, done.stderr
    return {processes: torch.load(folder / f"{processes}.pt", weights_only=True) for processes in (1, 2)}


def test_two_processes_train_as_one(outcomes):
    one, two = outcomes[1], outcomes[2]
    assert two["totals"]["steps"] == one["totals"]["steps"] == 3
    for name, value in one["totals"].items():
        assert two["totals"][name] == pytest.approx(value, rel=2e-4), name
    for name, tensor in one["model"].items():
        # A gradient that is zero up to rounding takes a sign step either way: hence not closer.
        assert torch.allclose(two["model"][name].double(), tensor.double(), rtol=2e-3, atol=2e-4), name


def test_batch_norm_uses_the_statistics_of_the_global_batch(outcomes):
    names = [n for n in outcomes[1]["model"] if n.endswith("running_var")]
    assert names
    for name in names:
        assert torch.allclose(outcomes[2]["model"][name], outcomes[1]["model"][name], rtol=1e-3, atol=1e-5), name


def test_two_processes_evaluate_all_images_once(outcomes):
    one, two = outcomes[1]["scores"], outcomes[2]["scores"]
    for attack in ("clean", "pgd3"):
        assert two[attack]["images"] == one[attack]["images"] == 48
        assert two[attack]["all"] == pytest.approx(one[attack]["all"], abs=100 / 48 + 1e-6), attack


def test_two_processes_resume_a_run_train_and_evaluate_it(tmp_path, monkeypatch):
    """A single process trained the teacher before."""
    run = tmp_path / "run"

    record = StageLog.epoch

    def record_and_signal(*args):
        record(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(StageLog, "epoch", record_and_signal)
        assert train_runs.train("--out", str(run), *TRAIN) == 75
    done = in_two_processes("-m", "ltat_fast.train", "--out", str(run), "--resume")
    assert done.returncode == 0, done.stderr
    assert "teacher: already trained" in done.stdout
    assert done.stdout.count("training images in 10 classes") == 1, "only the main process prints"
    scores = json.loads((run / "eval.json").read_text())
    assert scores["last"]["clean"]["images"] == 60
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1

    # One process evaluates the weights of two to the same numbers.
    again = ("--attacks", "clean,pgd20", "--again", "--limit-eval", "60")
    assert train_runs.status_of("evaluate", str(run), *again) == 0
    assert json.loads((run / "eval.json").read_text())["last"]["pgd20"]["all"] == scores["last"]["pgd20"]["all"]


def test_a_refused_start_ends_all_processes(tmp_path):
    done = in_two_processes("-m", "ltat_fast.train", "--out", str(tmp_path), "--eps", "8/0")
    assert done.returncode != 0
    assert "takes a fraction such as 8/255" in done.stderr
