import pytest

from helpers.toy_stage import HARDWARE, outcome, stage
from ltat_fast.training import speed
from ltat_fast.training.fit import fit


@pytest.fixture
def unmeasured(monkeypatch):
    """Set the FLOPs of a step and the speed of the machine instead of measuring them, which saves time.

    The uninterrupted stage does measure them. The others end with its numbers, so measuring changes nothing.
    """
    monkeypatch.setattr(speed, "flops_per_image", lambda eager, x, y: 1e9)
    monkeypatch.setattr(speed, "matmul_ceiling", lambda device, dtype: 1e12)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """The outcome of a stage that was never interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    progress = fit(stage(folder), HARDWARE)
    assert progress.finished
    return outcome(folder)
