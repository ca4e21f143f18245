"""Runs with random values in random places of their files: the report is written, or refused in one sentence."""

import contextlib
import copy
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from helpers import made_runs, train_runs
from ltat_fast.reporting import charts

FILES = ("config.json", "env.json", "eval.json", "analysis.json", "metrics.jsonl")
ODD = [0, -1, 1, 10, 99.5, 101, 10**400, 1e308, float("nan"), float("-inf"), True, None]
ODD += ["", "clean", "1/0", "1e-999", "8/255", "\x00", "é✓", "'", "<b>", [], [1, 2], [None] * 10, [[]], {}, {"all": 1}]
scalars = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def examples(number: int) -> settings:
    return settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


def write_run(folder: Path) -> dict[str, Any]:
    """Write a run with every file that a report reads, and return the contents of the files."""
    check = {"name": "steps", "passed": True, "value": 0.5, "detail": "fine", "weights": "ab"}
    worst = made_runs.accuracies(np.random.default_rng(0), [9, 5, 2]) | {"attacks": ["clean", "pgd20"]}
    attacks = ("clean", "pgd20x5", "autoattack")
    made_runs.write_run(folder, counts=(9, 5, 2), attacks=attacks, extra={"checks": [check], "worst": worst})
    gini = {"global": {"all": 0.5, "tail": None}, "blocks": {"pooled": 2}, "images": 60, "weights": "ab"}
    classwise = {"classes": [[0], [1], [2]], "pgd20": {"accuracy": [50.0, None, 3.0], "images": 60}, "images": 60}
    made_runs.write(folder / "analysis.json", {"last": {"inequality": gini, "classwise": classwise}})
    contents = {file: made_runs.read(folder / file) for file in FILES[:-1]}
    return contents | {FILES[-1]: [json.loads(line) for line in (folder / FILES[-1]).read_text().splitlines()]}


def damage(content: Any, data: st.DataObject) -> Any:
    """Return ``content`` with one random place changed or removed."""
    content = copy.deepcopy(content)
    inner = content
    while True:
        places = list(range(len(inner))) if isinstance(inner, list) else list(inner)
        place = data.draw(st.sampled_from(places) if places else st.text(max_size=3), "place")
        deeper = inner[place] if places else None
        if isinstance(deeper, list | dict) and deeper and data.draw(st.booleans(), "deeper"):
            inner = deeper
        elif places and data.draw(st.integers(0, 4), "removed if 0") == 0:
            del inner[place]
            return content
        else:
            inner[place] = data.draw(values, "value")
            return content


def report(folder: Path) -> tuple[int, str]:
    """Exit status and standard error of the report on ``folder``, with every file that it can write."""
    flags = [
        flag for kind in ("html", "markdown", "csv") for flag in (f"--{kind}", str(folder.with_suffix(f".{kind}")))
    ]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        return train_runs.status_of("report", str(folder), *flags), said.getvalue()


def try_damaged(data: st.DataObject) -> None:
    with TemporaryDirectory() as root:
        folder = Path(root) / "run"
        contents = write_run(folder)
        for file in data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2), "files"):
            contents[file] = damage(contents[file], data)
        for file, content in contents.items():
            text = json.dumps(content) if file != FILES[-1] else "".join(json.dumps(line) + "\n" for line in content)
            (folder / file).write_text(text)
        status, said = report(folder)
        assert status in (0, 2)
        assert said.count("\n") == (status == 2), said
        if status:
            assert any(file in said for file in FILES), said


@given(st.data())
@examples(40)
def test_one_sentence_or_a_report(data):
    with pytest.MonkeyPatch.context() as patched:  # drawing takes most of the time
        patched.setattr(charts, "to_svg", lambda ax, description: Markup('<svg aria-hidden="true"></svg>'))
        try_damaged(data)


def test_a_report_skips_and_names_damaged_records(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(charts, "to_svg", lambda ax, description: Markup(f"<p>{description}</p>"))
    write_run(tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b"\xff\n")
    assert train_runs.status_of("report", str(tmp_path / "run"), "--html", str(tmp_path / "page.html")) == 0
    assert f"WARNING: {log}: damaged and skipped: line 5" in " ".join(capsys.readouterr().out.split("\n"))
    assert "loss over epochs" in (tmp_path / "page.html").read_text().lower()


@pytest.mark.slow
@given(st.data())
@examples(500)
def test_one_sentence_or_a_report_with_plots(data):
    try_damaged(data)
