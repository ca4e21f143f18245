"""The plots show the measured values in the colours of the page."""

import json
import re
from contextlib import contextmanager
from statistics import mean, stdev

import numpy as np
import pytest

from helpers import made_runs
from ltat_fast.reporting import charts, figure
from ltat_fast.reporting.study import studies
from ltat_fast.runs.experiments import experiments

COUNTS = (20, 90, 5, 40)  # not in the order of frequency
BY_FREQUENCY = [1, 3, 0, 2]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each plot in drawing order, instead of pictures."""
    seen = []
    monkeypatch.setattr(charts, "to_svg", lambda ax, description: seen.append(ax))
    return seen


def study_of(*runs):
    (study,) = studies(experiments(list(runs)))
    return study, figure.styles(study.experiments)


@pytest.fixture
def runs(tmp_path):
    attacks = ("clean", "pgd20")
    return [
        made_runs.write_run(tmp_path / f"{m}{s}", method=m, seed=s, counts=COUNTS, attacks=attacks)
        for m in ("ltat", "at-bsl")
        for s in range(3)
    ]


def test_bars_are_the_means_of_the_classes_the_most_frequent_first(runs, drawn):
    charts.class_bars(*study_of(*runs))
    for i, ax in enumerate(drawn):
        scores = [made_runs.read(run / "eval.json")["last"] for run in runs[3 * i : 3 * i + 3]]
        for bars, attack in zip(ax.containers[:2], ("clean", "pgd20"), strict=True):
            expected = [mean(s[attack]["per_class"][c] for s in scores) for c in BY_FREQUENCY]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
        spreads = [abs(b[1] - a[1]) / 2 for a, b in ax.containers[2].lines[2][0].get_segments()]
        assert spreads == pytest.approx([stdev(s["pgd20"]["per_class"][c] for s in scores) for c in BY_FREQUENCY])
        labels = [label.get_text() for label in ax.get_xticklabels()]
        assert labels == [f"{c}\n{COUNTS[c]}" for c in BY_FREQUENCY]


def test_many_classes_are_drawn_as_one_outline(tmp_path, drawn):
    run = made_runs.write_run(tmp_path / "a", counts=range(50, 150), attacks=("clean", "pgd20"))
    charts.class_bars(*study_of(run))
    (ax,) = drawn
    per_class = made_runs.read(run / "eval.json")["last"]["pgd20"]["per_class"]
    assert ax.patches[1].get_data().values == pytest.approx(per_class[::-1])


def test_curves_are_the_means_of_the_epochs_that_were_evaluated(runs, drawn):
    study, styles = study_of(*runs)
    titles = [title for title, _ in charts.CURVES]
    assert [chart.title for chart in charts.training_curves(study, styles)] == titles
    for ax, (_, name) in zip(drawn, charts.CURVES, strict=True):
        for line, i in zip(ax.lines, (0, 3), strict=True):
            logs = [list(map(json.loads, (r / "metrics.jsonl").read_text().splitlines())) for r in runs[i : i + 3]]
            key = name if name in ("loss", "lr") else f"test_{name}"
            epochs = [record["epoch"] for record in logs[0] if key in record]
            assert line.get_xdata().tolist() == epochs
            assert line.get_ydata() == pytest.approx([mean(log[e - 1][key] for log in logs) for e in epochs])


def test_a_loss_that_is_not_a_number_is_left_out(tmp_path, drawn):
    run = made_runs.write_run(tmp_path / "a")
    (run / "metrics.jsonl").write_text(
        '{"epoch": 1, "loss": 2.0}\n{"epoch": 2, "loss": NaN}\n{"epoch": 3, "loss": 1.5}\n'
    )
    charts.training_curves(*study_of(run))
    assert drawn[0].lines[0].get_xydata().tolist() == [[1, 2.0], [3, 1.5]]


@pytest.mark.parametrize("images", ["heldout", "val"])
def test_curves_of_runs_that_selected_on_other_than_test_images(tmp_path, drawn, images):
    run = made_runs.write_run(tmp_path / "a", select_on=images)
    (run / "metrics.jsonl").write_text(f'{{"epoch": 1, "loss": 2.0, "{images}_pgd20": 30.5}}\n')
    charts.training_curves(*study_of(run))
    assert drawn[1].lines[0].get_xydata().tolist() == [[1, 30.5]]


def test_scatter_has_one_marker_per_run_and_checkpoint(runs, drawn):
    charts.scatter(*study_of(*runs))
    for ax, group in zip(drawn, ("all", "head", "tail"), strict=True):
        expected = []
        for run in runs:
            results = made_runs.read(run / "eval.json")
            expected += [[results[w][a][group] for a in ("clean", "pgd20")] for w in ("best", "last")]
        assert sorted(line.get_xydata()[0].tolist() for line in ax.lines) == sorted(expected)


def test_histograms_contain_every_gradient_except_zeros(runs, drawn):
    _, styles = study_of(*runs)
    rng = np.random.default_rng(0)
    sizes = [10 ** rng.uniform(-5, -1, 4000), np.concatenate([np.zeros(1000), 10 ** rng.uniform(-3, -2, 3000)])]
    charts.gradient_histograms({"Tail": sizes}, ["a", "b"], styles)
    shares = [patch.get_data() for patch in drawn[0].patches]
    assert [share.values.sum() for share in shares] == pytest.approx([100, 75], abs=0.2)
    edges, values = shares[1].edges, shares[1].values
    assert set(np.round(edges[:-1][values > 0], 6) >= -3.2) == {True}
    assert charts.gradient_histograms({"Tail": [np.zeros(5), np.zeros(5)]}, ["a", "b"], styles) == []


def test_a_method_looks_the_same_in_every_report(tmp_path):
    every = [made_runs.write_run(tmp_path / m, method=m) for m in figure.ORDER]
    _, all_styles = study_of(*every)
    assert len({style.colour for style in all_styles}) == len(figure.ORDER)
    for run, style in zip(every, all_styles, strict=True):
        assert study_of(run)[1] == [style]


def test_experiments_that_share_a_colour_differ_in_marker_and_dashes(tmp_path):
    _, styles = study_of(made_runs.write_run(tmp_path / "a"), made_runs.write_run(tmp_path / "b", epochs=7, lr=0.3))
    assert styles[0].colour == styles[1].colour
    assert styles[0].marker != styles[1].marker
    assert styles[0].dashes != styles[1].dashes


@contextmanager
def plot(text="x"):
    with figure.axes(200, 100) as ax:
        ax.plot([0, 1], [0, 1], color=figure.SERIES[2], marker="o")
        ax.set_title(text)
        yield ax


def test_colours_are_variables_and_fonts_are_the_pages():
    with plot() as ax:
        svg = figure.to_svg(ax, "a line")
    assert "var(--s3)" in svg
    assert "var(--muted)" in svg
    assert not re.search(r"#0101[0-9a-f]{2}|#000000|black", svg)
    assert "font-family" not in svg
    assert "DejaVu" not in svg
    assert "<style" not in svg
    assert 'aria-label="a line"' in svg


def test_two_figures_share_no_names_and_equal_ones_are_equal():
    svgs = []
    for text, description in (("x", "a line"), ("y", "a line"), ("x", "another"), ("x", "a line")):
        with plot(text) as ax:
            svgs.append(figure.to_svg(ax, description))
    names = [set(re.findall(r'id="([^"]*)"', svg)) for svg in svgs]
    assert names[0]
    assert not names[0] & names[1]
    assert not names[0] & names[2]
    assert svgs[0] == svgs[3]


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '" onload="x', "$\\frac{$", "$x_1$", "&amp;", "ü€"])
def test_text_in_a_plot_is_escaped(text):
    with plot(text) as ax:
        tree = made_runs.parse(figure.to_svg(ax, text))
    assert text in tree.text
    (svg,) = tree.find("svg")
    assert svg.attributes["aria-label"] == text
    assert not tree.find("script")
    assert not [e for e in tree if "onload" in e.attributes]
