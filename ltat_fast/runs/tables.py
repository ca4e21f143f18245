"""The paper's table of finished runs: Clean, PGD, AA, T-Clean and T-PGD of best and last, mean and std over seeds.

It has more columns if the runs were evaluated under other attacks. There is one table per dataset and network, and on
the terminal none is wider than 80 characters: columns that do not fit beside the others follow below them.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from ltat_fast.attacks.results import BALANCED, Result
from ltat_fast.runs.experiments import Experiment, comparable_worst, experiments
from ltat_fast.runs.results import CHECKPOINTS, CheckpointResults, EvalFile
from ltat_fast.runs.threats import attack_of, suffix_of

# heading, attack, group of classes
Column = tuple[str, str, str]
COLUMNS: list[Column] = [
    ("Clean", "clean", "all"),
    ("PGD", "pgd20", "all"),
    ("AA", "autoattack", "all"),
    ("T-Clean", "clean", "tail"),
    ("T-PGD", "pgd20", "tail"),
]
# Shown if a run has them: means of the accuracies of the classes, on a test set whose classes differ in size.
BALANCED_COLUMNS: list[Column] = [("B-Clean", "clean", BALANCED), ("B-PGD", "pgd20", BALANCED)]
# Shown if a run has them: images that are classified correctly under every attack.
WORST_COLUMNS: list[Column] = [("Worst", "worst", "all"), ("T-Worst", "worst", "tail")]
# Shown if a run has them: the groups of Liu et al. 2019, by training images of the class.
SHOT_COLUMNS: list[Column] = [
    (f"{heading}-{attack}", key, group)
    for heading, group in (("Many", "many_shot"), ("Med", "medium_shot"), ("Few", "few_shot"))
    for attack, key in (("Clean", "clean"), ("PGD", "pgd20"))
]
SELECTED_ON = {"heldout": "held-out training images", "val": "the validation split"}
WIDTH = 80  # of the terminal


@dataclass(frozen=True)
class Row:
    """One line: a checkpoint of an experiment. values: percent of each run, by heading; cells: the same as text."""

    label: str
    checkpoint: str
    seeds: int
    values: dict[str, list[float]]
    cells: list[str]


@dataclass(frozen=True)
class Table:
    """The experiments on one dataset with one network. notes: sentences about the numbers."""

    title: str
    headings: list[str]
    rows: list[Row]
    notes: list[str]


def columns(found: Sequence[Experiment]) -> list[Column]:
    """The paper's columns, those of the balanced accuracy if a run has it, and those of a comparable worst case.

    The worst case is comparable if some run has it on as many images as the other attacks, and all runs that have it
    combined the same attacks at each checkpoint.
    """
    return COLUMNS + _further_columns(found)


def _further_columns(found: Sequence[Experiment]) -> list[Column]:
    runs = [run for experiment in found for run in experiment.runs]
    evaluated = [run.evaluation.of(which) for run in runs for which in CHECKPOINTS]
    has_worst = any(map(_has_worst_of_all, evaluated)) and all(comparable_worst(runs, which) for which in CHECKPOINTS)
    balanced = with_balanced((run.evaluation for run in runs), [])
    return balanced + (SHOT_COLUMNS if _has_shots(found) else []) + (WORST_COLUMNS if has_worst else [])


def _evaluated_columns(found: Sequence[Experiment]) -> list[Column]:
    """:func:`columns` without attacks that no run was evaluated under, and with all others that one was."""
    evaluated = [part for e in found for run in e.runs for part in run.evaluation.checkpoints.values()]
    attacks = dict.fromkeys(name for part in evaluated for name in part.results)
    others = [name for name in attacks if name not in ("worst", *(attack for _, attack, _ in COLUMNS))]
    shown = [*COLUMNS, *((name, name, "all") for name in others), *((f"T-{name}", name, "tail") for name in others)]
    shown = sorted((column for column in shown if column[1] in attacks), key=lambda column: column[2])  # "tail" last
    return shown + _further_columns(found)


def _has_shots(found: Sequence[Experiment]) -> bool:
    return any(run.evaluation.has_group("many_shot") for experiment in found for run in experiment.runs)


def with_balanced(files: Iterable[EvalFile], columns: list[Column]) -> list[Column]:
    """Return ``columns``, with those of the balanced accuracy if one of ``files`` has it."""
    return columns + BALANCED_COLUMNS if any(file.has_group(BALANCED) for file in files) else columns


def _has_worst_of_all(evaluated: CheckpointResults) -> bool:
    """Whether the worst case is on as many images as any attack; on fewer it could not be compared with the others."""
    own_ball = {name: result for name, result in evaluated.results.items() if not suffix_of(name)}
    images = {name: result.images for name, result in own_ball.items() if result.images is not None}
    return "worst" in images and images["worst"] == max(images.values())


def cell(values: list[float], seeds: int) -> str:
    """Format "38.85"; over several seeds "38.85 ± 0.21"; if only some have a value "38.85 (1 of 3)"; if none "-"."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def build(found: Sequence[Experiment]) -> list[Table]:
    """One table per dataset, imbalance ratio and network, in the order given, with a row per checkpoint."""
    alike: dict[tuple[str, str, str], list[Experiment]] = {}
    for experiment in found:
        c = experiment.config
        alike.setdefault((c.dataset, c.ratio_text, c.arch), []).append(experiment)
    return [_table(f"{dataset}, imbalance ratio {ratio}, {arch}", e) for (dataset, ratio, arch), e in alike.items()]


def _table(name: str, found: Sequence[Experiment]) -> Table:
    shown = _evaluated_columns(found)
    headings = [heading for heading, _, _ in shown]
    rows, images = [], []
    for experiment in found:
        for which in CHECKPOINTS:
            values = [experiment.values(which, attack, group) for _, attack, group in shown]
            cells = [cell(each, len(experiment.runs)) for each in values]
            by_heading = dict(zip(headings, values, strict=True))
            rows.append(Row(experiment.label, which, len(experiment.runs), by_heading, cells))
            # The numbers of test images behind each cell: several if the runs of an experiment used different ones.
            numbers = [frozenset(experiment.images(which, attack)) for _, attack, _ in shown]
            images.append([each if known else frozenset() for each, known in zip(numbers, values, strict=True)])
    counted = Counter(numbers for of_row in images for numbers in of_row if numbers)
    usual = counted.most_common(1)[0][0] if counted else frozenset()
    marks = {numbers: f"[{i}]" for i, numbers in enumerate((n for n in counted if n != usual), 1)}
    for row, of_row in zip(rows, images, strict=True):
        row.cells[:] = [f"{text} {marks.get(n, '')}".rstrip() for text, n in zip(row.cells, of_row, strict=True)]
    notes = [f"{mark} {_count(numbers)} test images." for numbers, mark in marks.items()]
    title = f"{name}: percent of {_count(usual)} test images"
    return Table(title, headings, rows, notes + _notes(found, shown))


def _count(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers))) or "the"


def _notes(found: Sequence[Experiment], shown: list[Column]) -> list[str]:
    """What the columns mean, and how the best checkpoint was selected."""
    notes = ["T-: classes of the tail."] if any(group == "tail" for _, _, group in shown) else []
    if BALANCED_COLUMNS[0] in shown:
        notes.append("B-: mean of the accuracies of the classes.")
    if SHOT_COLUMNS[0] in shown:
        notes.append("Classes with > 100, 20 to 100 and < 20 training images: Many, Med, Few.")
    if WORST_COLUMNS[0] in shown:
        notes.append(_worst(found))
    selected_on = {experiment.config.select_on for experiment in found}
    if selected_on and selected_on <= SELECTED_ON.keys():
        notes.append(f"Best epoch by PGD-20 on {' or '.join(SELECTED_ON[name] for name in sorted(selected_on))}.")
    else:
        best = "Best epoch by PGD-20 on the test set, as in the published tables"
        notes.append(f"{best}: optimistic; compare last too.")
    return notes


def _worst(found: Sequence[Experiment]) -> str:
    """Which attacks and images the worst case is about: "Worst: correct under each of clean, pgd20, cw20; ..."."""
    of: dict[tuple[str, ...], list[str]] = {}
    images = set()
    for which in CHECKPOINTS:
        results = [run.evaluation.result(which, "worst") for e in found for run in e.runs]
        attacks = {tuple(sorted(result.attacks)): result.attacks for result in results if result}
        images |= {result.images for result in results if result and result.images is not None}
        for combined in attacks.values():  # one, or there would be no column
            of.setdefault(combined, []).append(which)
    told = [f"{', '.join(attacks)}" + (f" ({which[0]})" if len(of) > 1 else "") for attacks, which in of.items()]
    return f"Worst: correct under each of {' or '.join(told)}, over {_count(images)} test images."


def render(run_dirs: Sequence[Path]) -> str:
    """The tables as text for a terminal."""
    return "\n\n".join("\n".join(_lines(table)) for table in build(experiments(run_dirs)))


def of_network(title: str, eps: str, results: Mapping[str, Result]) -> str:
    """The results of one network as text: a line per attack and ball, a column per group of classes.

    results: by their names in the file. eps: radius of the L_inf ball of the names without a ball.
    """
    groups = ["all", *dict.fromkeys(group for result in results.values() for group in result.groups)]
    texts = [["", "eps", *groups, "images"]]
    for name, result in results.items():
        ball = suffix_of(name)[1:] or eps
        numbers = [result.percent(group) for group in groups]
        cells = ["-" if number is None else f"{number:.2f}" for number in numbers]
        attack = attack_of(name)
        images = "-" if result.images is None else str(result.images)
        texts.append([attack, "-" if attack == "clean" else ball, *cells, images])
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    rows = [f"  {line[0]:<{widths[0]}}" + _right(line[1:], widths[1:]) for line in texts]
    worst = next((result for name, result in results.items() if name == "worst"), None)
    notes = _wrapped(f"worst: correct under each of {', '.join(worst.attacks)}.") if worst else []
    return "\n".join([*_wrapped(f"{title}: percent of test images"), "", *rows, *([""] if notes else []), *notes])


def _right(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(cell.rjust(width + 2) for cell, width in zip(cells, widths, strict=True))


def _lines(table: Table) -> Iterator[str]:
    yield from _wrapped(table.title)
    name_width = 2 + max(map(len, CHECKPOINTS))
    texts = [[heading, *(row.cells[i] for row in table.rows)] for i, heading in enumerate(table.headings)]
    widths = [2 + max(map(len, column)) for column in texts]
    for block in _blocks(table.headings, widths, WIDTH - name_width):
        yield ""
        yield " " * name_width + "".join(table.headings[i].rjust(widths[i]) for i in block)
        label = None
        for row in table.rows:
            if all(row.cells[i] == "-" for i in block) and len(block) < len(widths):
                continue  # another block shows this row
            if row.label != label:
                label = row.label
                yield from _wrapped(f"{label}, {row.seeds} seeds" if row.seeds > 1 else label)
            numbers = "".join(row.cells[i].rjust(widths[i]) for i in block)
            yield f"  {row.checkpoint}".ljust(name_width) + numbers
    yield ""
    for note in table.notes:
        yield from _wrapped(note)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _blocks(headings: list[str], widths: list[int], room: int) -> list[list[int]]:
    """Divide the columns into blocks that fit into ``room`` characters; a column that is wider is alone.

    If not all fit into one block, the columns of the tail begin a new one.
    """
    if sum(widths) <= room:
        return [list(range(len(widths)))]
    blocks: list[list[int]] = []
    for i, width in enumerate(widths):
        begins_tail = headings[i].startswith("T-") and not headings[i - 1].startswith("T-")
        if not blocks or begins_tail or sum(widths[j] for j in blocks[-1]) + width > room:
            blocks.append([])
        blocks[-1].append(i)
    return blocks
