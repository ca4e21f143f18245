"""A process of a run that dies or never starts: the other processes end with an error instead of waiting for it."""

import os

import pytest

from helpers import launching, train_runs
from ltat_fast.errors import UserError
from ltat_fast.training import distributed

ENDLESS = ("--method", "pgd-at", "--epochs", "1000000", "--eval-every", "1000000", "--lr-schedule", "step")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(tmp_path, monkeypatch, victim):
    # A regular shutdown of the interpreter aborts the survivor in one case of five or so, of many small buckets.
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'regular shutdown')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    metrics = tmp_path / "run" / "metrics.jsonl"
    with launching.running(tmp_path / "run", *ENDLESS, processes=2) as processes:
        train_runs.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, *processes)
        processes[victim].kill()
        said, err = train_runs.finish(processes[1 - victim], status=4)
    last = err.splitlines()[-1]
    assert last.startswith("ltat_fast: another process of this run died, see its own message (")
    assert "peer" in last
    assert "Traceback" not in err
    assert "regular shutdown" not in said


def test_a_process_that_never_comes(monkeypatch):
    import datetime

    monkeypatch.setattr(distributed, "JOIN_TIMEOUT", datetime.timedelta(seconds=1))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="the 2 processes of this run did not find each other: "):
        distributed.start(use_cuda=False)


def test_divergence_ends_all_processes_and_each_dumps_its_share(tmp_path, capfd):
    out = tmp_path / "run"
    with launching.running(out, "--lr", "1e30", "--method", "at-bsl", processes=2) as processes:
        errors = [train_runs.finish(process, status=3)[1] for process in processes]
    assert all("student: loss not finite at epoch 1, step 2" in err for err in errors)
    dumps = sorted((out / "nan").iterdir())
    assert [dump.name for dump in dumps] == [f"epoch-1-step-2-process-{rank}.safetensors" for rank in (0, 1)]
    assert train_runs.status_of("replay", str(dumps[1])) == 0
    assert "this is the share of one of 2 processes" in capfd.readouterr().out
