"""Matplotlib figures as SVG inside a page, with the fonts and colours of the page and without external files.

Colours are CSS variables, so that the same drawing fits a light and a dark page. Matplotlib has no such variables:
figures are drawn in placeholder colours (almost black, used for nothing else), which are replaced by the variables.
"""

import hashlib
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ltat_fast.methods import METHODS
from ltat_fast.runs.experiments import Experiment

INK, MUTED, GRID, PAPER = "#010100", "#010101", "#010102", "#010103"
SERIES = [f"#0101{0x10 + i:02x}" for i in range(8)]
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"}
VARIABLES |= {stand_in: f"s{i + 1}" for i, stand_in in enumerate(SERIES)}

# Each group of four colours can be told apart with any colour blindness; markers and dashes separate the groups.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
# Each method of the paper's main table has its own colour, which is the same in every report.
ORDER = ("ltat", "at-bsl", "pgd-at", "trades", "robal", "mart", "awp", "reat")

RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ltat-fast",
    "text.parse_math": False,
    "font.size": 11,
    "axes.labelsize": 11,
    "axes.edgecolor": GRID,
    "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.major.size": 0,
    "figure.facecolor": "none",
    "figure.constrained_layout.use": True,
    "lines.linewidth": 1.8,
}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Style:
    """How every plot of the page draws an experiment."""

    colour: str
    marker: str
    dashes: str | tuple

    @property
    def variable(self) -> str:
        """The colour in CSS."""
        return f"var(--{VARIABLES[self.colour]})"


def styles(experiments: tuple[Experiment, ...]) -> list[Style]:
    """Choose the colour by method. Experiments with the same colour get different markers and dashes."""
    order = [*ORDER, *(name for name in METHODS if name not in ORDER)]
    chosen: list[Style] = []
    for experiment in experiments:
        method = experiment.config.method
        place = order.index(method) if method in order else len(order)
        colour = SERIES[place % len(SERIES)]
        taken = sum(style.colour == colour for style in chosen)
        dashes = DASHES[(place // 4 + taken) % len(DASHES)]
        chosen.append(Style(colour, MARKERS[(place + taken) % len(MARKERS)], dashes))
    return chosen


@contextmanager
def axes(width: float, height: float) -> Iterator[Axes]:
    """Empty axes in a figure of this size in CSS pixels."""
    with matplotlib.rc_context(RC):
        yield Figure(figsize=(width / 72, height / 72)).add_subplot()


def to_svg(ax: Axes, description: str) -> Markup:
    """Return the figure of ``ax`` as an ``<svg>`` element. Call it inside the ``with`` block of :func:`axes`.

    description: text for screen readers. Without one the figure is hidden from them as decoration.
    """
    out = io.StringIO()
    ax.figure.savefig(out, format="svg", metadata=NO_METADATA)
    text = out.getvalue()
    root = ElementTree.fromstring(text)
    for parent in list(root.iter()):
        for child in [c for c in parent if _local(c.tag) in ("style", "metadata")]:  # it would style the whole page
            parent.remove(child)
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    # All figures of a page share one namespace; figures with the same drawing differ in their description.
    own = f"f{hashlib.sha256((text + description).encode()).hexdigest()[:8]}-"
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(name): value for name, value in element.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        element.attrib.clear()
        element.attrib.update({name: _rewritten(name, value, own) for name, value in attributes.items()})
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    said = {"role": "img", "aria-label": description} if description else {"aria-hidden": "true"}
    root.attrib |= {"class": "chart"} | said
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    """An XML name without its namespace, as HTML wants it."""
    return name.rpartition("}")[2]


def _rewritten(name: str, value: str, own: str) -> str:
    if name == "id":
        return own + value
    if name in ("href", "clip-path"):
        return value.replace("#", f"#{own}", 1)
    if name == "style":
        value = re.sub(r"font: (?:[^;\d]*\s)?([\d.]+px)[^;]*", r"font-size: \1", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
        return re.sub(r"#0101[0-9a-f]{2}", lambda found: f"var(--{VARIABLES[found[0]]})", value)
    return value
