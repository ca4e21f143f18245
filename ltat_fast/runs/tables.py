"""Runs as the paper's table: Clean, PGD, AA, T-Clean, T-PGD for best and last, mean and std over seeds."""

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ltat_fast.attacks.by_name import AUTOATTACK
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS
from ltat_fast.runs.results import read_json, read_results

# heading, attack, group of classes
COLUMNS = [
    ("Clean", "clean", "all"),
    ("PGD", "pgd20", "all"),
    ("AA", "autoattack", "all"),
    ("T-Clean", "clean", "tail"),
    ("T-PGD", "pgd20", "tail"),
]
# Shown where a run has them: the images that stay right under every attack that was tried.
WORST_COLUMNS = [("Worst", "worst", "all"), ("T-Worst", "worst", "tail")]
CHECKPOINTS = ("best", "last")
NUMBERS_FROM = 6  # the columns before it say which experiment a line is of
# Runs that differ in nothing but these are repetitions of one experiment, if all trained their own teacher or none did.
NOT_THE_EXPERIMENT = {"seed", "out", "data_dir", "teacher", "device", "resume", "eval_batch_size", "save_minutes"}
NEEDED = {"dataset", "method", "arch", "imbalance_ratio", "select_on", "seed", "eps"}


@dataclass(frozen=True)
class Run:
    """A finished run as its folder tells it. name: the end of its path, as much of it as no other run shares."""

    name: str
    path: Path
    config: dict
    results: dict
    environment: dict


@dataclass(frozen=True)
class Experiment:
    """Runs that are repetitions of one another, each with a seed of its own."""

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict:
        return self.runs[0].config

    def checkpoints(self) -> list[str]:
        return [which for which in CHECKPOINTS if any(which in run.results for run in self.runs)]

    def values(self, which: str, attack: str, group: str) -> list[float]:
        """Percent of each run that has it; none of "worst" where it is of other attacks in one run than in the next."""
        if attack == "worst" and not comparable_worst(self.runs, which):
            return []
        return scores([run.results for run in self.runs], which, attack, group)

    def images(self, which: str, attack: str) -> set[int]:
        """How many test images the runs used for it."""
        found = [run.results.get(which, {}).get(attack, {}).get("images") for run in self.runs]
        return {number for number in found if number is not None}


def scores(results: list[dict], which: str, attack: str, group: str) -> list[float]:
    """Percent of one checkpoint under one attack, of each content of an eval.json that has it."""
    found = [result.get(which, {}).get(attack, {}).get(group) for result in results]
    return [score for score in found if score is not None]


def comparable_worst(runs: Iterable[Run], which: str) -> bool:
    """Whether "worst" is over the same attacks in all ``runs`` that have it, AutoAttack among them where it was run.

    Limited to fewer images than the rest, AutoAttack is left out of it, and a worst case without it is none beside it.
    """
    entries = [entry for run in runs if "worst" in (entry := run.results.get(which, {}))]
    attacks = {frozenset(entry["worst"].get("attacks", [])) for entry in entries}
    strongest = set().union(*entries) & AUTOATTACK.keys()
    return len(attacks) <= 1 and all(strongest <= tried for tried in attacks)


def load_results(run_dir: Path) -> tuple[dict, dict]:
    """config.json and eval.json of a run. Raises UserError if it has none yet."""
    config, results = read_json(run_dir / "config.json"), read_results(run_dir / "eval.json")
    if missing := NEEDED - config.keys():
        raise UserError(f"{run_dir / 'config.json'} is damaged: it does not say {', '.join(sorted(missing))}")
    return config, results


def experiments(run_dirs: list[Path]) -> list[Experiment]:
    """The runs, those that are repetitions of one another together, in the order given.

    Experiments that differ in settings alone that :func:`label` does not tell have those in their labels: "epochs=4".
    Runs with given teachers are repetitions of one another only while no seed comes twice; then each teacher is an
    experiment of its own. Raises UserError for a run without results, and for two runs of one experiment with one seed.
    """
    alike: dict[str, list[Run]] = {}
    for run in load_runs(run_dirs):
        alike.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    found = []
    for runs in alike.values():
        teachers: dict[str | None, list[Run]] = {}
        for run in runs:
            teachers.setdefault(run.config.get("teacher") if _repeated_seed(runs) is not None else None, []).append(run)
        for teacher, repetitions in teachers.items():
            if (seed := _repeated_seed(repetitions)) is not None:
                names = " and ".join(run.name for run in repetitions if run.config["seed"] == seed)
                raise UserError(f"{names} are one experiment with one seed, {seed}, and would count as two: name one")
            of_teacher = f" teacher={Path(teacher).name}" if teacher is not None else ""
            found.append(Experiment(label(repetitions[0].config) + of_teacher, tuple(repetitions)))
    return _told_apart(found)


def _told_apart(found: list[Experiment]) -> list[Experiment]:
    """With the settings that differ behind labels that coincide, of experiments in one place of the table."""
    alike: dict[tuple, list[dict]] = {}
    places = [(e.label, e.config["dataset"], e.config["imbalance_ratio"], e.config["arch"]) for e in found]
    settings = [_settings(e.runs[0]) for e in found]
    for place, own in zip(places, settings, strict=True):
        alike.setdefault(place, []).append(own)
    labelled = []
    for experiment, place, own in zip(found, places, settings, strict=True):
        differing = [k for k in own if any(k not in other or other[k] != own[k] for other in alike[place])]
        told = [f"{k}={own[k]}" for k in differing if own[k] is not None]
        labelled.append(dataclasses.replace(experiment, label=" ".join([experiment.label, *told])))
    return labelled


def load_runs(run_dirs: list[Path]) -> list[Run]:
    """Each run once, however often it is named. Raises UserError for one without results."""
    paths = list(dict.fromkeys(path.resolve() for path in run_dirs))
    runs = []
    for path in paths:
        config, results = load_results(path)
        environment = read_json(path / "env.json") if (path / "env.json").exists() else {}
        runs.append(Run(_shortest_name(path, paths), path, config, results, environment))
    return runs


def _shortest_name(path: Path, paths: list[Path]) -> str:
    for length in range(1, len(path.parts) + 1):
        if sum(other.parts[-length:] == path.parts[-length:] for other in paths) == 1:
            break
    return "/".join(path.parts[-length:])


def _settings(run: Run) -> dict:
    """What repetitions share: the settings that make the experiment, and the training images."""
    settings = {k: v for k, v in run.config.items() if k not in NOT_THE_EXPERIMENT}
    settings |= settings.pop("method_options", {})
    settings["teacher"] = "own" if run.config.get("teacher") is None else "given"
    return settings | {"train_images": run.environment.get("index_hash")}


def _repeated_seed(runs: list[Run]) -> int | None:
    seed, times = Counter(run.config["seed"] for run in runs).most_common(1)[0]
    return seed if times > 1 else None


def columns(found: list[Experiment]) -> list[tuple[str, str, str]]:
    """The paper's columns, and those of the worst case if a run has it of as many images as the rest.

    At each checkpoint the worst case must be over the same attacks in all runs that have it.
    """
    runs = [run for experiment in found for run in experiment.runs]
    entries = [run.results.get(which, {}) for run in runs for which in CHECKPOINTS]
    has_worst = any(map(_has_worst_of_all, entries)) and all(comparable_worst(runs, which) for which in CHECKPOINTS)
    return COLUMNS + WORST_COLUMNS if has_worst else COLUMNS


def _has_worst_of_all(entry: dict) -> bool:
    """Of fewer images, those AutoAttack was limited to, it would look better or worse beside the rest than it is."""
    images = {name: e["images"] for name, e in entry.items() if isinstance(e, dict) and "images" in e}
    return "worst" in images and images["worst"] == max(images.values())


def rows(found: list[Experiment]) -> list[dict]:
    """One dict an experiment and checkpoint: its config, "checkpoint", "seeds", and a list of values a column."""
    shown = columns(found)
    return [
        {
            "label": experiment.label,
            "config": experiment.config,
            "checkpoint": which,
            "seeds": len(experiment.runs),
            "images": experiment.images(which, "clean") | experiment.images(which, "autoattack"),
            "values": {heading: experiment.values(which, a, group) for heading, a, group in shown},
        }
        for experiment in found
        for which in CHECKPOINTS
    ]


def cell(values: list[float], seeds: int) -> str:
    """ "38.85", over several seeds "38.85 ± 0.21", measured on some of them "38.85 (1 of 3)", on none "-"."""
    if not values:
        return "-"
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def label(config: dict) -> str:
    """The method, and those of its options that are not its defaults: "ard igdm_alpha=20.0"."""
    known = METHODS.get(config["method"])
    defaults = dataclasses.asdict(known()) if known else {}
    options = config.get("method_options", {})
    changed = [f"{name}={value}" for name, value in options.items() if defaults.get(name) != value]
    return " ".join([config["method"], *changed])


def ratio_text(config: dict) -> str:
    return "as found" if config["imbalance_ratio"] is None else f"{config['imbalance_ratio']:g}"


def cells(found: list[Experiment]) -> tuple[list[str], list[list[str]]]:
    """The table as headings and lines of text; from column :data:`NUMBERS_FROM` on they are numbers."""
    headings = [heading for heading, _, _ in columns(found)]
    lines = []
    for row in rows(found):
        c = row["config"]
        name = [row["label"], c["dataset"], ratio_text(c), c["arch"], row["checkpoint"], str(row["seeds"])]
        lines.append(name + [cell(row["values"][heading], row["seeds"]) for heading in headings])
    return ["method", "dataset", "IR", "arch", "checkpoint", "seeds", *headings], lines


def render(run_dirs: list[Path]) -> str:
    """The table as text."""
    found = experiments(run_dirs)
    headings, lines = cells(found)
    table = Table(title=None)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i >= NUMBERS_FROM else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    out = io.StringIO()
    # More than it needs: a narrow console would cut the numbers short.
    Console(file=out, width=250 + max(len(experiment.label) for experiment in found)).print(table)
    return out.getvalue() + note(found)


def note(found: list[Experiment]) -> str:
    """How many test images the numbers are of, and what picked the best checkpoint."""
    images = sorted(set().union(*(row["images"] for row in rows(found))))
    heldout = {experiment.config["select_on"] for experiment in found} == {"heldout"}
    return f"Percent of {' or '.join(map(str, images)) or 'the'} test images; tail: see eval.json. " + (
        "Best epoch by PGD-20 on held-out training images."
        if heldout
        else "Best epoch by PGD-20 on the test set, as in the published tables: optimistic; compare last too."
    )
