"""The peak memory of a step shrinks with the number of its micro-batches."""

import csv

from bench import memory


def test_micro_batches_need_less_memory(tmp_path):
    out = tmp_path / "memory.csv"
    flags = ["--device", "cpu", "--arch", "smallresnet", "--image-size", "32", "--batch-size", "256"]
    memory.main([*flags, "--accumulate", "1", "8", "--out", str(out)])
    one, eight = csv.DictReader(out.open())
    assert (one["accumulate"], eight["accumulate"]) == ("1", "8")
    # The activations of a step need far more than the images and the weights, which stay.
    assert float(eight["step_mib"]) < 0.5 * float(one["step_mib"])
