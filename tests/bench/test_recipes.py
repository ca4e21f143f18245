"""The cost of each recipe, in forward passes of the network, is the one that bench.recipes predicts."""

import csv

import pytest

from bench import recipes

FORWARDS = {"AT-BSL": 23, "LTAT": 28, "LTAT + AWP": 36, "LTAT + EMA": 28, "LTAT + class-wise eps": 28}
FORWARDS |= {"LTAT + label smoothing": 28, "LTAT + all": 36, "LTAT, one step": 10, "LTAT, one step + all": 18}


def test_forward_passes_of_each_recipe(tmp_path):
    out = tmp_path / "recipes.csv"
    flags = ["--device", "cpu", "--arch", "smallresnet", "--image-size", "16", "--batch-size", "8", "--rounds", "2"]
    recipes.main([*flags, "--precision", "fp32", "--out", str(out)])
    rows = {row["recipe"]: row for row in csv.DictReader(out.open())}
    # The first convolution needs no gradient of the images in the loss, so a step costs slightly less.
    assert {name: float(row["forwards"]) for name, row in rows.items()} == pytest.approx(FORWARDS, abs=0.3)
    assert rows["LTAT"]["relative"] == "1.00"
    assert float(rows["LTAT, one step"]["median_ms"]) > 0
