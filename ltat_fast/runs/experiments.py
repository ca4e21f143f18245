"""Group finished runs into experiments. The runs of one experiment differ only in the seed and in the machine."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltat_fast.attacks.by_name import AUTOATTACK
from ltat_fast.config import Config, changed_modifiers
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS
from ltat_fast.runs.finished import FinishedRun, RunConfig, load_runs
from ltat_fast.runs.results import CHECKPOINTS, percentages

# Runs that differ only in these settings belong to one experiment, if all of them or none trained their own teacher.
NOT_THE_EXPERIMENT = {"seed", "out", "data_dir", "teacher", "device", "compile", "resume", "eval_batch_size"}
NOT_THE_EXPERIMENT |= {"save_minutes", "on_collapse", "log_every"}


@dataclass(frozen=True)
class Experiment:
    """Runs that repeat one another with different seeds."""

    label: str
    runs: tuple[FinishedRun, ...]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    def checkpoints(self) -> list[str]:
        return [which for which in CHECKPOINTS if any(which in run.evaluation.checkpoints for run in self.runs)]

    def values(self, which: str, attack: str, group: str) -> list[float]:
        """Percent from each run that has it. Empty for "worst" if the runs combined different attacks."""
        if attack == "worst" and not comparable_worst(self.runs, which):
            return []
        return percentages([run.evaluation for run in self.runs], which, attack, group)

    def images(self, which: str, attack: str) -> set[int]:
        """The numbers of test images that the runs used."""
        found = [run.evaluation.result(which, attack) for run in self.runs]
        return {result.images for result in found if result and result.images is not None}


def comparable_worst(runs: Iterable[FinishedRun], which: str) -> bool:
    """Whether "worst" combines the same attacks in all ``runs`` that have it, with AutoAttack if any of them ran it.

    AutoAttack is not part of "worst" where it was limited to fewer images than the other attacks. A worst case without
    AutoAttack is not comparable with an AutoAttack result.
    """
    evaluated = [results for run in runs if "worst" in (results := run.evaluation.of(which).results)]
    combined = {frozenset(results["worst"].attacks) for results in evaluated}
    strongest = set().union(*evaluated) & AUTOATTACK.keys()
    return len(combined) <= 1 and all(strongest <= attacks for attacks in combined)


def experiments(run_dirs: Sequence[Path]) -> list[Experiment]:
    """The experiments of these runs, in the order given.

    If experiments have the same :func:`label`, the settings in which they differ are added: "ltat epochs=4". Runs with
    ``--teacher`` are one experiment if no seed occurs twice; otherwise there is one experiment per teacher.
    Raises UserError for a run without results, and for two runs of one experiment with the same seed.
    """
    alike: dict[str, list[FinishedRun]] = {}
    for run in load_runs(run_dirs):
        alike.setdefault(json.dumps(_settings(run), sort_keys=True), []).append(run)
    found = []
    for runs in alike.values():
        teachers: dict[tuple[str | None, str | None], list[FinishedRun]] = {}
        for run in runs:
            given = (run.config.teacher, run.environment.data.get("teacher"))
            teachers.setdefault(given if _repeated_seed(runs) is not None else (None, None), []).append(run)
        for (teacher, weights), repetitions in teachers.items():
            if (seed := _repeated_seed(repetitions)) is not None:
                names = " and ".join(run.name for run in repetitions if run.config.seed == seed)
                raise UserError(f"{names} are the same experiment with the same seed, {seed}: name only one of them")
            of_teacher = f" teacher={Path(teacher).name}" if teacher is not None else ""
            if sum(name == teacher for name, _ in teachers) > 1:  # one file that held several teachers
                of_teacher += f" ({weights or 'weights not recorded'})"
            found.append(Experiment(label(repetitions[0].config) + of_teacher, tuple(repetitions)))
    return _told_apart(found)


def label(config: RunConfig) -> str:
    """The method, the origin of its settings if not the paper, its options that are not defaults, and its modifiers.

    For example "ard igdm_alpha=20.0", "reat settings=authors" and "ltat + awp 0.005".
    """
    defaults, options = _default_options(config), config.method_options
    changed = {name: value for name, value in options.items() if defaults.get(name) != value}
    if config.has_authors_settings:
        changed = {"settings": "authors"} | changed
    return " ".join([config.method, *(f"{name}={value}" for name, value in changed.items())]) + modifiers(config)


def modifiers(config: RunConfig) -> str:
    """The modifiers that are not defaults: " + awp 0.005 + ema 0.995"; empty if there are none."""
    changed = changed_modifiers(config.settings)
    words = ((name.replace("_", "-"), "" if value is True else f" {value}") for name, value in changed.items())
    return "".join(f" + {name}{value}" for name, value in words)


def _default_options(config: RunConfig) -> dict[str, Any]:
    known = METHODS.get(config.method)
    return dataclasses.asdict(known()) if known else {}


def _told_apart(found: list[Experiment]) -> list[Experiment]:
    """Make equal labels of one part of the table unique by adding the settings that differ."""
    alike: dict[tuple, list[dict]] = {}
    places = [(e.label, e.config.dataset, e.config.imbalance_ratio, e.config.arch) for e in found]
    settings = [_settings(e.runs[0]) for e in found]
    for place, own in zip(places, settings, strict=True):
        alike.setdefault(place, []).append(own)
    labelled = []
    for experiment, place, own in zip(found, places, settings, strict=True):
        differing = [k for k in own if any(k not in other or other[k] != own[k] for other in alike[place])]
        told = [f"{k}={own[k]}" for k in differing if own[k] is not None]
        labelled.append(dataclasses.replace(experiment, label=" ".join([experiment.label, *told])))
    return labelled


def _settings(run: FinishedRun) -> dict[str, Any]:
    """What repetitions have in common: the settings of the experiment, and the images.

    A run of an earlier version lacks later settings. It trained as their defaults do.
    """
    settings = dataclasses.asdict(Config()) | run.config.settings
    settings = {name: value for name, value in settings.items() if name not in NOT_THE_EXPERIMENT}
    settings |= _default_options(run.config) | run.config.method_options
    settings["teacher"] = "own" if run.config.teacher is None else "given"
    return settings | {"training_set": run.training_set, "test_set": run.test_set}


def _repeated_seed(runs: list[FinishedRun]) -> int | None:
    seed, times = Counter(run.config.seed for run in runs).most_common(1)[0]
    return seed if times > 1 else None
