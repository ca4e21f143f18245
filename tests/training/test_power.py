"""A power cut at any moment loses what was not synced, and the stage still ends with all of its records."""

import os

import pytest

from helpers import power_cuts
from helpers.toy_stage import HARDWARE, PER_EPOCH, assert_same_outcome, outcome, saved, stage
from ltat_fast.errors import UserError
from ltat_fast.runs.records import StageLog, read_metrics, read_steps
from ltat_fast.training.fit import fit

pytestmark = [
    pytest.mark.usefixtures("unmeasured"),
    pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="sees through /proc which file is synced"),
]


def images_of_a_stage(root, monkeypatch, **changes) -> list[power_cuts.Image]:
    """What power cuts at all moments of a stage would leave."""
    root.mkdir()
    with monkeypatch.context() as patched:
        cuts = power_cuts.PowerCuts(root, patched)
        try:
            assert fit(stage(root, **changes), HARDWARE).finished
        finally:
            cuts.close()
    return cuts.images


def lost_records(folder) -> int:
    """The records that the newest state in ``folder`` claims and its logs lack."""
    try:
        state = saved(folder)
    except UserError:  # there is no state yet
        return 0
    epochs = {record["epoch"] for record in read_metrics(folder / "metrics.jsonl")}
    steps = {record["step"] for record in read_steps(folder / "steps.jsonl")}
    places = [(epoch, step) for epoch in range(state["epoch"]) for step in (2, 4, PER_EPOCH)]  # --log-every 2
    places += [(state["epoch"], step) for step in (2, 4) if step <= state["step"]]
    claimed = {epoch * PER_EPOCH + step for epoch, step in places}
    return len(set(range(1, state["epoch"] + 1)) - epochs) + len(claimed - steps)


@pytest.mark.parametrize("save_minutes", [10.0, 1e-9], ids=["saved per epoch", "saved per step"])
def test_no_state_claims_a_record_that_a_power_cut_loses(tmp_path, monkeypatch, save_minutes):
    images = images_of_a_stage(tmp_path / "whole", monkeypatch, save_minutes=save_minutes)
    assert len(images) > 20
    folders = [power_cuts.write(image, tmp_path / str(i)) for i, image in enumerate(images)]
    assert [lost_records(folder) for folder in folders] == [0] * len(images)


def test_the_stage_resumes_from_every_power_cut_to_the_same_numbers(tmp_path, monkeypatch, uninterrupted):
    images = images_of_a_stage(tmp_path / "whole", monkeypatch)
    for i, image in enumerate(images):
        folder = power_cuts.write(image, tmp_path / str(i))
        assert fit(stage(folder), HARDWARE).finished
        assert_same_outcome(outcome(folder), uninterrupted)


def test_the_cuts_find_a_log_that_is_not_synced(tmp_path, monkeypatch):
    """Without the sync before each save, as it was once, states claim records that are lost."""
    monkeypatch.setattr(StageLog, "sync", lambda self: None)
    images = images_of_a_stage(tmp_path / "whole", monkeypatch)
    folders = [power_cuts.write(image, tmp_path / str(i)) for i, image in enumerate(images)]
    assert max(map(lost_records, folders)) > 0
