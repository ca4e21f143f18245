"""The HTML page of a report. It is one file that loads nothing else, so it can be sent and opened without a network."""

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ltat_fast import __version__
from ltat_fast.config import parse_fraction
from ltat_fast.reporting import charts, findings, protocol
from ltat_fast.reporting.figure import Style, styles
from ltat_fast.reporting.headline import headline, names
from ltat_fast.reporting.pictures import Gallery, gallery
from ltat_fast.reporting.study import Study, attack_name, options, studies, summary
from ltat_fast.runs import tables
from ltat_fast.runs.experiments import Experiment
from ltat_fast.runs.results import CHECKPOINTS


@dataclass(frozen=True)
class PlottedMethod:
    """An experiment with its name and its style on the page."""

    name: str
    options: str
    style: Style
    key: Markup
    experiment: Experiment


@dataclass(frozen=True)
class Line:
    """A line of the main table. best: for each cell, whether no other method has a higher mean."""

    method: PlottedMethod
    cells: list[str]
    best: list[bool]
    checks: list[findings.ShownCheck]


def render(found: list[Experiment], device: torch.device, data_dir: Path | None = None) -> str:
    """Return the page about the experiments ``found`` as HTML.

    device: computes the pictures. data_dir: folder of the images; None for the one that the runs used.
    """
    # Class names and run names come from files, so everything is escaped, not only in templates that are
    # named *.html.
    environment = Environment(
        loader=PackageLoader("ltat_fast.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": summary, "whole": _whole}
    views = [_view(study, gallery(study, device, data_dir)) for study in studies(found)]
    return environment.get_template("page.html.j2").render(studies=views, version=__version__)


def _whole(text: str) -> Markup:
    """Mark words with a hyphen and numbers with their unit, so that a browser does not break the line in them."""
    return Markup(
        re.sub(r"[\w()]+-[\w()-]+|[\d.]+( ± [\d.]+)? %", r'<span class="whole">\g<0></span>', str(escape(text)))
    )


def _view(study: Study, shown: Gallery) -> dict:
    look = styles(study.experiments)
    methods = [
        PlottedMethod(name, options(e), style, charts.key(style), e)
        for e, name, style in zip(study.experiments, names(study.experiments), look, strict=True)
    ]
    pictured = [methods[place] for place in shown.methods]
    result = headline(study, shown.test_counts)
    sections, damaged = findings.analyses(study)
    return {
        "study": study,
        "methods": methods,
        "headline": result,
        "ranking": [(next(m for m in methods if m.experiment is rank.experiment), rank) for rank in result.ranking],
        "attack": attack_name(study.attack or "clean"),
        "columns": [heading for heading, _, _ in tables.columns(list(study.experiments))],
        "tables": [(which, _lines(study, methods, which)) for which in reversed(CHECKPOINTS)],
        "repeated": any(len(e.runs) > 1 for e in study.experiments),
        "note": protocol.images_and_selection(study),
        "curves": charts.training_curves(study, look),
        "class_bars": charts.class_bars(study, look),
        "scatter": charts.scatter(study, look),
        "gallery": shown,
        "pictured": pictured,
        "zeros": list(zip(pictured, shown.zeros, strict=True)),
        "amplified": 1 / (2 * parse_fraction(study.config.eps)),
        "gradients": charts.gradient_histograms(
            shown.gradients, [m.name for m in pictured], [m.style for m in pictured]
        ),
        "analyses": sections,
        "damaged": damaged,
        "facts": protocol.facts(study, shown.test_counts),
        "attacks": protocol.attacks(study),
        "classes": _classes(study),
        "environments": protocol.environments(study),
        "settings": protocol.settings(study),
        "numbers": _numbers(study, methods),
    }


def _lines(study: Study, methods: list[PlottedMethod], which: str) -> list[Line]:
    columns = tables.columns(list(study.experiments))
    lines = []
    for method in methods:
        e = method.experiment
        if which not in e.checkpoints():
            continue
        values = [e.values(which, attack, group) for _, attack, group in columns]
        rivals = [
            [mean(v) for other in study.experiments if (v := other.values(which, attack, group))]
            for _, attack, group in columns
        ]
        best = [bool(v) and len(r) > 1 and mean(v) == max(r) for v, r in zip(values, rivals, strict=True)]
        cells = [tables.cell(v, len(e.runs)) for v in values]
        lines.append(Line(method, cells, best, findings.checks(e, which)))
    return lines


def _classes(study: Study) -> list[tuple[str, int | None, str]]:
    """Name, training images and groups of each class, the most frequent first."""
    counts, groups, class_names = study.counts, study.groups, study.class_names()
    return [
        (class_names[c], counts[c] if counts else None, ", ".join(g for g, members in groups.items() if c in members))
        for c in study.by_frequency()
    ]


def _numbers(study: Study, methods: list[PlottedMethod]) -> tuple[list[str], list[tuple]]:
    """Headings of the groups of classes, and one line per experiment, checkpoint and attack.

    A line holds the method, checkpoint, attack, cells and number of images.
    """
    results = [result for run in study.runs for result in run.evaluation.every_result()]
    groups = dict.fromkeys(group for result in results for group in ("all", *result.groups))
    lines = []
    for method in methods:
        e = method.experiment
        for which in e.checkpoints():
            for attack in study.attacks():
                if e.values(which, attack, "all"):
                    cells = [tables.cell(e.values(which, attack, group), len(e.runs)) for group in groups]
                    images = " or ".join(map(str, sorted(e.images(which, attack)))) or "-"
                    lines.append((method, which, attack_name(attack), cells, images))
    return list(groups), lines
