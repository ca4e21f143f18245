import pytest

from helpers.toy_stage import HARDWARE, outcome, stage
from ltat_fast.training import speed
from ltat_fast.training.fit import fit


@pytest.fixture
def unmeasured(monkeypatch):
    """No time for the FLOPs of a step and the speed of the machine. The uninterrupted stage does measure them: that the
    others end with its numbers also shows that measuring changes nothing."""
    monkeypatch.setattr(speed, "flops_per_image", lambda eager, x, y: 1e9)
    monkeypatch.setattr(speed, "matmul_ceiling", lambda device, dtype: 1e12)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    progress = fit(stage(folder), HARDWARE)
    assert progress.finished
    return outcome(folder)
