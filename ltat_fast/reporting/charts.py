"""The plots of a study: training curves, accuracy by class, clean against robust, input gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.ticker import MaxNLocator

from ltat_fast.reporting.figure import INK, PAPER, Style, axes, to_svg
from ltat_fast.reporting.headline import names
from ltat_fast.reporting.study import Study, attack_name, summary
from ltat_fast.runs.experiments import Experiment
from ltat_fast.runs.json_object import is_number
from ltat_fast.runs.records import read_metrics
from ltat_fast.runs.results import CHECKPOINTS, percentages

PANEL = (340, 220)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LABELLED_CLASSES = 30  # with more classes, bars touch each other and names do not fit

# title, key in metrics.jsonl without the prefix "test_", "heldout_" or "val_"
CURVES = [
    ("Training loss", "loss"),
    ("All classes, clean", "clean"),
    ("All classes, PGD-20", "pgd20"),
    ("Learning rate", "lr"),
    ("Tail, clean", "tail_clean"),
    ("Tail, PGD-20", "tail_pgd20"),
]


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup


def key(style: Style) -> Markup:
    """The line and marker of an experiment, for a legend. It has no ids, because the page shows it several times."""
    marker = MarkerStyle(style.marker)
    with axes(30, 14) as ax:
        ax.set(xlim=(-15, 15), ylim=(-7, 7))
        ax.set_axis_off()
        ax.set_position((0, 0, 1, 1))
        ax.plot([-14, 14], [0, 0], color=style.colour, linestyle=style.dashes, clip_on=False)
        outline = marker.get_path().transformed(marker.get_transform().scale(6.5))
        ax.add_patch(PathPatch(outline, color=style.colour, linewidth=0, clip_on=False))
        return to_svg(ax, "")


def training_curves(study: Study, styles: Sequence[Style]) -> list[Chart]:
    """One plot per entry of :data:`CURVES` that a run has: the mean over seeds as a line, their range as a band."""
    records = [[read_metrics(run.path / "metrics.jsonl") for run in e.runs] for e in study.experiments]
    charts = []
    for title, name in CURVES:
        wanted = [name] if name in ("loss", "lr") else [f"test_{name}", f"heldout_{name}", f"val_{name}"]
        curves = [_curve(runs, wanted) for runs in records]
        if not any(curves):
            continue
        with axes(*PANEL) as ax:
            for curve, style in zip(curves, styles, strict=True):
                epochs = sorted(curve)
                line = [mean(curve[e]) for e in epochs]
                ax.plot(epochs, line, color=style.colour, linestyle=style.dashes)
                low, high = [min(curve[e]) for e in epochs], [max(curve[e]) for e in epochs]
                if low != high:
                    ax.fill_between(epochs, low, high, color=style.colour, alpha=0.15, linewidth=0)
            if name not in ("loss", "lr"):
                ax.set_ylim(-1.5, 101.5)
            else:
                ax.set_ylim(bottom=0)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_xlabel("epoch")
            charts.append(Chart(title, to_svg(ax, _curves_described(title, study, curves))))
    return charts


def _curve(runs: list[list[dict]], wanted: list[str]) -> dict[int, list[float]]:
    """The values of each epoch, one per run that has it."""
    curve: dict[int, list[float]] = {}
    for records in runs:
        for record in records:
            value = next((record[name] for name in wanted if record.get(name) is not None), None)
            if is_number(value) and isfinite(value):
                curve.setdefault(record["epoch"], []).append(value)
    return curve


def _curves_described(title: str, study: Study, curves: list[dict]) -> str:
    ends = [
        f"{name} ends at {mean(curve[max(curve)]):.3g}"
        for name, curve in zip(names(study.experiments), curves, strict=True)
        if curve
    ]
    return f"{title} over epochs, {study.title}: {', '.join(ends)}"


def class_bars(study: Study, styles: Sequence[Style]) -> list[Chart]:
    """One plot of the accuracy per class for each experiment, the most frequent class first.

    Clean accuracy is drawn behind, accuracy under attack in front.
    """
    attack = study.attack
    order, classes = study.by_frequency(), study.class_names()
    charts = []
    for experiment, name, style in zip(study.experiments, names(study.experiments), styles, strict=True):
        clean, robust = (_per_class(experiment, study.checkpoint, a, order) for a in ("clean", attack))
        if clean is None and robust is None:
            continue
        with axes(PANEL[0], PANEL[1] + 10) as ax:
            for values, alpha in ((clean, 0.3), (robust, 1.0)):
                if values is not None:
                    _bars(ax, [mean(v) if v else 0.0 for v in values], style, alpha)
            if robust is not None and len(order) <= LABELLED_CLASSES:
                _spreads(ax, robust)
            ax.set_ylim(0, 101)
            _class_axis(ax, study, order, classes)
            rare = order[-1]
            ends = [
                f"{what} {summary(v[-1])} %" for what, v in (("clean", clean), (attack_name(attack or ""), robust)) if v
            ]
            about = f"{name}: accuracy by class. Rarest class, {classes[rare]}: {', '.join(ends)}"
            charts.append(Chart(name, to_svg(ax, about)))
    return charts


def _per_class(experiment: Experiment, which: str, attack: str | None, order: list[int]) -> list[list[float]] | None:
    """For each class in ``order`` the values over the seeds; None if the attack was not run."""
    results = [run.evaluation.result(which, attack or "") for run in experiment.runs]
    tables = [result.per_class for result in results if result and result.per_class]
    return [[t[c] for t in tables if t[c] is not None] for c in order] if tables else None


def _bars(ax: Axes, heights: list[float], style: Style, alpha: float) -> None:
    if len(heights) <= LABELLED_CLASSES:
        ax.bar(range(len(heights)), heights, width=0.78, color=style.colour, alpha=alpha, linewidth=0)
    else:
        edges = np.arange(len(heights) + 1) - 0.5
        ax.stairs(heights, edges, fill=True, color=style.colour, alpha=alpha, linewidth=0)


def _spreads(ax: Axes, values: list[list[float]]) -> None:
    several = [(i, mean(v), stdev(v)) for i, v in enumerate(values) if len(v) > 1]
    if several:
        ax.errorbar(*zip(*several, strict=True), fmt="none", ecolor=INK, elinewidth=1, capsize=0)


def _class_axis(ax: Axes, study: Study, order: list[int], classes: list[str]) -> None:
    ax.set_xlim(-0.6, len(order) - 0.4)
    if len(order) > LABELLED_CLASSES:
        ax.set_xticks([])
        ax.set_xlabel("classes, the most frequent in training first")
        return
    counts = study.counts
    long = max(len(name) for name in classes) > 3
    labels = [_short(classes[c]) if long or counts is None else f"{classes[c]}\n{counts[c]}" for c in order]
    ax.set_xticks(range(len(order)), labels, rotation=60 if long else 0, ha="right" if long else "center")
    if long:
        ax.tick_params(axis="x", pad=1)
    else:
        ax.set_xlabel("class, and its training images" if counts else "class")


def _short(name: str) -> str:
    return name if len(name) <= 12 else f"{name[:11]}…"


def scatter(study: Study, styles: Sequence[Style]) -> list[Chart]:
    """Clean against attacked accuracy for each group of classes: one marker per run, hollow for best."""
    charts = []
    for title, group in (("All classes", "all"), ("Head", "head"), ("Tail", "tail")):
        points = [
            (style, which, x, y)
            for experiment, style in zip(study.experiments, styles, strict=True)
            for run in experiment.runs
            for which in CHECKPOINTS
            for x in percentages([run.evaluation], which, "clean", group)
            for y in percentages([run.evaluation], which, study.attack or "", group)
        ]
        if not points:
            continue
        with axes(PANEL[0], PANEL[0] * 0.75) as ax:
            for style, which, x, y in points:
                face = style.colour if which == "last" else PAPER
                ax.plot(
                    x, y, style.marker, color=style.colour, mfc=face, mec=style.colour, ms=7, mew=1.5, clip_on=False
                )
            ax.grid(axis="x")
            ax.margins(0.1)
            ax.set_xlabel("clean, %")
            ax.set_ylabel(f"{attack_name(study.attack)}, %")
            about = (
                f"{title}: clean accuracy against accuracy under {attack_name(study.attack)}, {len(points)} markers; "
            )
            charts.append(Chart(title, to_svg(ax, about + "the numbers are in the table of all numbers")))
    return charts


def gradient_histograms(
    magnitudes: dict[str, list[np.ndarray]], methods: list[str], styles: Sequence[Style]
) -> list[Chart]:
    """Distribution of the absolute input gradient: one plot per group of classes, one line per method.

    magnitudes: by title of the plot, one array of values >= 0 per method. Zeros cannot be drawn on the logarithmic
    axis; the page gives their share in its text.
    """
    charts = []
    positive = [values[values > 0] for arrays in magnitudes.values() for values in arrays]
    if not any(map(len, positive)):
        return []
    low, high = np.log10(np.quantile(np.concatenate(positive), [0.001, 1]))
    edges = np.linspace(low, max(high, low + 1), 41)
    for title, arrays in magnitudes.items():
        with axes(*PANEL) as ax:
            for values, style in zip(arrays, styles, strict=True):
                number, _ = np.histogram(np.log10(values[values > 0]), edges)
                share = 100 * number / max(1, len(values))
                ax.stairs(share, edges, color=style.colour, linestyle=style.dashes, linewidth=1.6, baseline=None)
            ax.set_ylim(bottom=0)
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.xaxis.set_major_formatter(lambda power, _: "10" + f"{power:.0f}".translate(SUPERSCRIPT))
            ax.set_xlabel("absolute input gradient")
            ax.set_ylabel("% of pixels")
            middle = [f"{m} {np.median(v):.2g}" for m, v in zip(methods, arrays, strict=True)]
            charts.append(
                Chart(title, to_svg(ax, f"{title}: size of the input gradient; medians: {', '.join(middle)}"))
            )
    return charts
