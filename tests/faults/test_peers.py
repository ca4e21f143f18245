"""A process of a run that dies, or never comes: the others end soon, and say so, instead of waiting for it."""

import time

import launching
import pytest

from ltat_fast.engine import distributed
from ltat_fast.errors import UserError

LONG = ("--epochs", "1000", "--eval-every", "100")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run(tmp_path, victim):
    out = tmp_path / "run"
    with launching.running(out, *LONG, processes=2) as processes:
        metrics = out / "metrics.jsonl"
        assert launching.wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, processes)
        processes[victim].kill()
        died = time.monotonic()
        other = processes[1 - victim]
        _, err = other.communicate(timeout=60)
        assert time.monotonic() - died < 60
    assert other.returncode == 4, err
    last = err.splitlines()[-1]
    assert last.startswith("ltat_fast: another process of this run is gone, see what it said (")
    assert "peer" in last
    assert "Traceback" not in err


def test_a_process_that_never_comes(monkeypatch):
    import datetime

    monkeypatch.setattr(distributed, "JOIN_WITHIN", datetime.timedelta(seconds=1))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 9}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="the 2 processes of this run did not find each other: "):
        distributed.start(use_cuda=False)
