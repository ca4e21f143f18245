"""Command line of Theorem 1: closed forms, a Monte-Carlo check, and logistic regression on finite samples.

python -m ltat_fast.analysis.theorem [--ratios 1 2 5] [--out runs/theory]     # table and figures, docs/theory.md
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from rich.table import Table

from ltat_fast import cli, files
from ltat_fast.analysis import theorem_figures
from ltat_fast.analysis.gaussians import Gaussians, corollary_gap, monte_carlo, theorem
from ltat_fast.analysis.logistic import fitted_errors
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.runs import log


@dataclass(frozen=True)
class Arguments:
    """Check Theorem 1: closed forms, Monte-Carlo, and logistic regression, as a table and two figures."""

    ratios: tuple[float, ...] = (1.0, 2.0, 5.0)
    """imbalance ratios"""
    eta: float = 1.0
    """the means of the two classes are +eta and -eta"""
    n: int = 2
    """number of dimensions; the decision boundaries are drawn only for 2"""
    eps: float = 0.5
    """radius of the adversary"""
    samples: int = 1000
    """training samples of each logistic regression"""
    fits: int = 100
    """number of logistic regressions, each on its own samples"""
    draws: int = 100_000
    """samples per class of the Monte-Carlo check"""
    out: Path = Path("runs/theory")
    """folder for the figures"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, "python -m ltat_fast.analysis.theorem", argv)
    if min(arguments.samples, arguments.draws) < 1 or arguments.fits < 2:
        raise UserError("--samples and --draws must be 1 or more, --fits 2 or more")
    try:
        settings = [Gaussians(r, arguments.eta, arguments.n, arguments.eps) for r in arguments.ratios]
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        fits = [fitted_errors(setting, arguments.samples, arguments.fits) for setting in settings]
    except ValueError as error:
        raise UserError(f"{error}: give more --samples than {arguments.samples}") from None
    files.make_folder(arguments.out)
    log.console.print(render(settings, fits, arguments.draws))
    for setting, runs in zip(settings, fits, strict=True):
        gaps = [errors["rob", "rob", "tail"] > errors["nat", "rob", "tail"] for errors in runs]
        log.say(
            f"IR {setting.ratio:g}: R_rob(f_rob) - R_rob(f_nat) of the tail is {corollary_gap(setting):.4f}, above 0 "
            f"in {sum(gaps)} of {len(gaps)} logistic regressions on {arguments.samples} samples"
        )
    for path in theorem_figures.write(settings, fits, arguments.samples, arguments.out):
        log.say(f"wrote {path}")


def render(settings: list[Gaussians], fits: list[list[dict]], draws: int) -> Table:
    """The table of every error in percent: theorem, Monte-Carlo check, and mean and deviation over the fits."""
    table = Table()
    for heading in ("IR", "classifier", "error", "class", "theorem", "Monte-Carlo", "logistic regression"):
        table.add_column(heading, justify="left" if heading in ("classifier", "error", "class") else "right")
    for setting, runs in zip(settings, fits, strict=True):
        measured = monte_carlo(setting, draws, np.random.default_rng(0))
        for key, exact in theorem(setting).items():
            values = [100 * errors[key] for errors in runs]
            numbers = (f"{100 * exact:.2f}", f"{100 * measured[key]:.2f}", f"{mean(values):.2f} ± {stdev(values):.2f}")
            table.add_row(f"{setting.ratio:g}", *key, *numbers)
        table.add_section()
    return table


if __name__ == "__main__":
    main()
