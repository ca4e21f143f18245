"""docs/adding-a-method.md is correct: its example trains, its test passes, its table is complete."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from helpers import three_steps, train_runs
from ltat_fast.methods import METHODS, Method
from ltat_fast.runs.records import read_metrics

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-method.md").read_text()
METHOD_FILE, TEST_FILE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def alp(tmp_path, monkeypatch):
    """The method of the page, imported from a file and registered in METHODS."""
    file = tmp_path / "alp.py"
    file.write_text(METHOD_FILE)
    spec = importlib.util.spec_from_file_location("alp", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "alp", module)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "alp", module.Alp)
    return module.Alp


def test_the_example_trains_with_its_own_flag(alp, tmp_path):
    run = tmp_path / "run"
    short = ("--max-steps", "2", "--epochs", "1", "--eval-attacks", "clean", "--limit-eval", "50")
    assert train_runs.train("--method", "alp", "--pairing", "0.3", "--out", str(run), *short) == 0
    (record,) = read_metrics(run / "metrics.jsonl")
    assert record["loss"] == pytest.approx(record["ce"] + 0.3 * record["distance"], rel=1e-5)
    assert record["distance"] > 0
    assert json.loads((run / "config.json").read_text())["method_options"] == {"pairing": 0.3}


def test_the_examples_own_test_passes(alp):
    names = {**vars(three_steps), "Alp": alp}
    exec(TEST_FILE, names)
    names["test_three_steps_equal_the_formula"]()


def test_the_example_is_ten_lines():
    body = METHOD_FILE[METHOD_FILE.index("@dataclass") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 11


def test_the_table_lists_everything_that_a_method_can_override():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert listed == {name for name in vars(Method) if not name.startswith("_")}
    for file in set(re.findall(r"\| `(\w+\.py)` \|", PAGE)):
        assert (Path(three_steps.__file__).parents[2] / "ltat_fast" / "methods" / file).exists(), file
