"""Figures 2 and 3 of the LTAT paper, reproduced: decision boundaries, and accuracy of the tail over the ratio."""

from pathlib import Path
from statistics import mean, stdev

import numpy as np
from matplotlib.figure import Figure

from ltat_fast import files
from ltat_fast.analysis.gaussians import Gaussians, theorem
from ltat_fast.analysis.logistic import fit

COLOURS = {"nat": "tab:blue", "rob": "tab:red"}
NAMES = {"nat": "natural", "rob": "adversarial"}


def write(settings: list[Gaussians], fits: list[list[dict]], samples: int, folder: Path) -> list[Path]:
    """Write the figures to ``folder`` and return their paths. fits: for each setting, from ``fitted_errors``.

    Raises UserError if a figure cannot be written; an older file of the same name is then kept.
    """
    figures = {"theory-tail-accuracy.png": tail_accuracy(settings, fits)}
    if settings[0].n == 2:
        figures["theory-boundaries.png"] = boundaries(settings, samples)
    for name, figure in figures.items():
        with files.atomic_write(folder / name) as file:
            figure.savefig(file, dpi=90)
    return [folder / name for name in figures]


def boundaries(settings: list[Gaussians], samples: int) -> Figure:
    """Samples in the plane, with the boundaries of both logistic regressions and of the theorem."""
    figure = Figure((3.2 * len(settings), 3.6), layout="constrained")
    for axes, setting in zip(figure.subplots(1, len(settings), squeeze=False)[0], settings, strict=True):
        x, y = setting.sample(samples, np.random.default_rng(0))
        for label, colour in ((1, "0.75"), (-1, "0.35")):
            axes.scatter(*x[y == label].T, s=3, color=colour, label=f"y = {label:+d}")
        reach = setting.eta + 3.5
        line = np.array([-2 * reach, 2 * reach])
        for name, eps in (("nat", 0.0), ("rob", setting.eps)):
            weights, bias = fit(x, y, eps)
            axes.plot(line, -(bias + weights[0] * line) / weights[1], color=COLOURS[name], label=NAMES[name])
            optimal = -setting.optimal_bias(eps) * 2**0.5 - line
            axes.plot(line, optimal, "--", color=COLOURS[name], label=f"{NAMES[name]}, theorem")
        axes.set(title=f"IR = {setting.ratio:g}", xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=7)
    return figure


def tail_accuracy(settings: list[Gaussians], fits: list[list[dict]]) -> Figure:
    """Natural and robust accuracy of the tail class: the theorem as lines, the fits as points with deviations."""
    figure = Figure((7.0, 3.6), layout="constrained")
    ratios = [setting.ratio for setting in settings]
    grid = np.geomspace(min(ratios), max(ratios), 100)
    like = settings[0]
    for axes, error in zip(figure.subplots(1, 2), ("nat", "rob"), strict=True):
        for name, colour in COLOURS.items():
            key = (name, error, "tail")
            exact = [100 - 100 * theorem(Gaussians(r, like.eta, like.n, like.eps))[key] for r in grid]
            axes.plot(grid, exact, color=colour, label=f"{NAMES[name]} training, theorem")
            values = [[100 - 100 * errors[key] for errors in runs] for runs in fits]
            spreads = [stdev(v) for v in values]
            style = {"fmt": "o", "capsize": 3, "color": colour, "label": f"{NAMES[name]}, logistic regression"}
            axes.errorbar(ratios, [mean(v) for v in values], spreads, **style)
        axes.set(xlabel="imbalance ratio", title="natural" if error == "nat" else f"robust, eps = {like.eps:g}")
    figure.axes[0].set_ylabel("accuracy of the tail class (%)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    return figure
