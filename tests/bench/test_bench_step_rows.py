"""Rows of bench.step: written one by one, chosen by name, the row of the CUDA graph in a process of its own."""

import csv
import sys

import pytest
import torch

from bench import step as bench_step
from bench.step import GRAPH, ladder, main

FLAGS = "--device cpu --arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1 --rounds 2"
COMPILED = "+ torch.compile"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "step.csv"


def rows(path):
    with path.open(newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def replace_rows(monkeypatch, **replaced):
    """Let the table have the plain reference and what ``replaced`` builds."""
    monkeypatch.setattr(bench_step, "ladder", lambda p: {"reference": ladder(p)["reference"], **replaced})


def test_rows_before_a_compiled_one_are_written_before_it_is_built(out, monkeypatch):
    written = []

    def compiled():
        written.extend(rows(out))
        raise RuntimeError("no compiler")

    replace_rows(monkeypatch, **{COMPILED: compiled})
    main([*FLAGS.split(), "--out", str(out)])
    assert written == ["reference"]
    assert rows(out)[COMPILED]["note"] == "RuntimeError: no compiler"
    assert float(rows(out)["reference"]["median_ms"]) > 0


def test_a_chosen_row_is_compared_with_the_reference_that_is_not_written(out):
    main([*FLAGS.split(), "--out", str(out), "--rows", "+ channels_last"])
    (row,) = rows(out).values()
    assert row["variant"] == "+ channels_last"
    assert float(row["speedup"]) > 0


def test_an_unknown_row_is_refused(out, capsys):
    with pytest.raises(SystemExit):
        main([*FLAGS.split(), "--out", str(out), "--rows", "no such"])
    assert "no such row: no such; choose from reference," in capsys.readouterr().err
    assert not out.exists()


def test_a_graph_process_that_dies_leaves_a_note(out, monkeypatch):
    """The other process is real. It has no such row on the CPU, and exits with status 2."""
    replace_rows(monkeypatch, **{GRAPH: lambda: pytest.fail("built in this process")})
    main([*FLAGS.split(), "--out", str(out)])
    assert rows(out)[GRAPH]["note"] == "its process ended with status 2"
    assert rows(out)["reference"]["note"] == ""


def test_the_row_of_the_graph_process_comes_first(out, monkeypatch, tmp_path, capsys):
    """A stand-in for Python writes the row that the process would write on a GPU."""
    main([*FLAGS.split(), "--out", str(tmp_path / "step-known.csv"), "--rows", "+ channels_last"])
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\nsed "s/+ channels_last/{GRAPH}/" "{tmp_path}/step-known.csv" >"{out}"\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    replace_rows(monkeypatch, **{GRAPH: lambda: pytest.fail("built in this process")})
    main([*FLAGS.split(), "--out", str(out)])
    assert list(rows(out)) == [GRAPH, "reference"]
    assert GRAPH in capsys.readouterr().out  # in the table


def test_a_lever_is_in_force_while_a_row_is_built_and_named_in_it(out, monkeypatch):
    seen, before = [], torch.backends.cudnn.benchmark_limit

    def compiled():
        seen.append(torch.backends.cudnn.benchmark_limit)
        raise RuntimeError("no compiler")

    replace_rows(monkeypatch, **{COMPILED: compiled})
    main([*FLAGS.split(), "--out", str(out), "--rows", COMPILED, "--search-all-convolutions"])
    assert seen == [0]
    assert list(rows(out)) == [f"{COMPILED}, search-all-convolutions"]
    assert torch.backends.cudnn.benchmark_limit == before
