"""The most important numbers of RUN/analysis.json as a table for the terminal."""

import io

from rich.console import Console
from rich.table import Table

# heading, and the place of the number in the analysis
ROWS = [
    ("GD, cross-entropy", "alignment/clean/gd/ce"),
    ("GC, cross-entropy", "alignment/clean/gc/ce"),
    ("GC, true-class logit", "alignment/clean/gc/logit"),
    ("GC, random projection", "alignment/clean/gc/projection"),
    ("GC, cross-entropy, attacked", "alignment/adv/gc/ce"),
    ("remainder of the logits", "linearity/remainder/logits"),
    ("distance of probabilities, noise", "linearity/distance/uniform/probabilities"),
    ("distance of probabilities, attacked", "linearity/distance/adv/probabilities"),
    ("Gini, global", "inequality/global"),
    ("Gini, regional", "inequality/regional/pooled"),
    ("INA1, error %", "corruptions/ina1/mean"),
    ("INA2, error %", "corruptions/ina2/mean"),
    ("RN, error %", "corruptions/rn/mean"),
    ("occlusion, grey, error %", "corruptions/occlusion/grey"),
    ("gaussian noise, error %", "corruptions/gaussian/mean"),
    ("shot noise, error %", "corruptions/shot/mean"),
    ("impulse noise, error %", "corruptions/impulse/mean"),
    ("PGD-20 by class frequency, %", "classwise/pgd20/accuracy"),
]


def render(checkpoint: str, runs: list[tuple[str, dict[str, dict]]]) -> str:
    """The table with one column per run. Rows that no run has are left out.

    runs: the name of each run, and its numbers for ``checkpoint`` by part.
    """
    table = Table()
    table.add_column(checkpoint, no_wrap=True)
    for name, _ in runs:
        table.add_column(name, justify="right", no_wrap=True)
    for heading, path in ROWS:
        cells = [cell(numbers, path) for _, numbers in runs]
        if any(text != "-" for text in cells):
            table.add_row(heading, *cells)
    out = io.StringIO()
    Console(file=out, width=80 + 40 * len(runs)).print(table)
    return out.getvalue() + (
        "Means over the test images, in brackets of the tail classes; errors on the images that all runs get right."
    )


def cell(numbers: dict, path: str) -> str:
    """Format "0.812 (0.774)" for all and tail, or the numbers of a list in a row; "-" if there is no number."""
    for name in path.split("/"):
        numbers = numbers.get(name, {})
    if isinstance(numbers, list):
        return " ".join("-" if value is None else f"{value:.0f}" for value in numbers)
    if not numbers or numbers["all"] is None:
        return "-"
    tail = "" if numbers.get("tail") is None else f" ({numbers['tail']:.3g})"
    return f"{numbers['all']:.3g}{tail}"
