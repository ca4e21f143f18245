"""Studies: experiments that may be compared, because they share dataset, images, network and eps."""

import json
import re
from dataclasses import dataclass
from statistics import mean, stdev

from safetensors import SafetensorError, safe_open

from ltat_fast.data.longtail import class_groups
from ltat_fast.errors import UserError
from ltat_fast.runs.experiments import Experiment, comparable_worst, modifiers
from ltat_fast.runs.finished import FinishedRun, RunConfig
from ltat_fast.runs.json_object import JsonObject, is_text, list_of

# Method names that are not written in capitals.
NAMES = {"natural": "Natural", "robal": "RoBal", "adaad": "AdaAD", "adaiad": "AdaIAD"}
ATTACK_NAMES = {
    "clean": "no attack",
    "autoattack": "AutoAttack",
    "autoattack-original": "AutoAttack (original package)",
    "autoattack-plus": "AutoAttack plus",
    "autoattack-rand": "AutoAttack rand",
    "square": "Square Attack",
    "worst": "all attacks together",
}
STRENGTH = ("clean", "fgsm", "pgd", "scaled-pgd", "cw", "autoattack", "worst")


def attack_name(attack: str) -> str:
    """The name of an attack in texts: "PGD-20" for "pgd20", "PGD-20 from 5 starts" for "pgd20x5"."""
    name, _, starts = attack.partition("x") if re.search(r"\dx\d", attack) else (attack, "", "")
    name = ATTACK_NAMES.get(name) or re.sub(r"([a-z])(\d)", r"\1-\2", name).upper()
    return f"{name} from {starts} starts" if starts else name


def method_name(experiment: Experiment) -> str:
    """The name of the method and its modifiers: "LTAT + awp 0.005"."""
    method = experiment.config.method
    return NAMES.get(method, method.upper()) + modifiers(experiment.config)


def options(experiment: Experiment) -> str:
    """The part of the label that :func:`method_name` does not tell: "alpha=10.0"."""
    without_modifiers = experiment.label.replace(modifiers(experiment.config), "", 1)
    return without_modifiers.removeprefix(experiment.config.method).strip()


@dataclass(frozen=True)
class Study:
    """Experiments that may be compared.

    checkpoint and attack: the ones that the headline and the plots show. The attack is one under which every run was
    evaluated: the one on the most images, and among equals the strongest. None if there is no such attack.
    """

    experiments: tuple[Experiment, ...]
    checkpoint: str
    attack: str | None

    @property
    def config(self) -> RunConfig:
        return self.experiments[0].config

    @property
    def runs(self) -> list[FinishedRun]:
        return [run for experiment in self.experiments for run in experiment.runs]

    @property
    def title(self) -> str:
        c = self.config
        return f"{c.dataset}, imbalance ratio {c.ratio_text}, {c.arch}, ε = {c.eps}"

    @property
    def counts(self) -> list[int] | None:
        """Training images of each class; None if no run recorded them."""
        return next((list(counts) for run in self.runs if (counts := run.environment.class_counts)), None)

    @property
    def groups(self) -> dict[str, list[int]]:
        return class_groups(self.counts, self.config.dataset) if self.counts else {}

    @property
    def num_classes(self) -> int:
        return max(map(_num_classes, self.runs))

    def by_frequency(self) -> list[int]:
        """The classes, the most frequent in training first; in the order of their numbers if the counts are unknown."""
        counts = self.counts or [0] * self.num_classes
        return sorted(range(self.num_classes), key=lambda c: (-counts[c], c))

    def class_names(self) -> list[str]:
        """The names in a weights file of the study; the numbers of the classes if there is none."""
        for run in self.runs:
            names = _class_names(run, self.checkpoint)
            if len(names) == self.num_classes:
                return names
        return [str(c) for c in range(self.num_classes)]

    def attacks(self) -> list[str]:
        """Every attack that a run was evaluated under, weak ones first ("clean" is the weakest)."""
        evaluated = [part for run in self.runs for part in run.evaluation.checkpoints.values()]
        return sorted(dict.fromkeys(name for part in evaluated for name in part.results), key=_strength)


def studies(found: list[Experiment]) -> list[Study]:
    """Group the experiments into studies, in the order given."""
    alike: dict[str, list[Experiment]] = {}
    for experiment in found:
        c = experiment.config
        classes, first = max(map(_num_classes, experiment.runs)), experiment.runs[0]
        key = [c.dataset, c.imbalance_ratio, c.arch, c.eps, classes, first.training_set, first.test_set]
        alike.setdefault(json.dumps(key), []).append(experiment)
    return [_study(tuple(group)) for group in alike.values()]


def _study(group: tuple[Experiment, ...]) -> Study:
    """Choose checkpoint and attack.

    The checkpoint is "best" if it was selected on images other than the test set or if "last" is missing, else "last",
    because a checkpoint that was selected on the test set is optimistic.
    """
    held_out = all(e.config.select_on in ("heldout", "val") and "best" in e.checkpoints() for e in group)
    have_last = all("last" in e.checkpoints() for e in group)
    checkpoint = "best" if held_out or not have_last else "last"
    tried = [set(run.evaluation.of(checkpoint).results) for e in group for run in e.runs]
    common = set.intersection(*tried) - {"clean"}
    if not comparable_worst((run for e in group for run in e.runs), checkpoint):
        common -= {"worst"}

    def rank(attack: str) -> tuple:
        return min(min(e.images(checkpoint, attack), default=0) for e in group), _strength(attack)

    return Study(group, checkpoint, max(common, key=rank, default=None))


def _strength(attack: str) -> tuple[int, list[int]]:
    """A key to sort attacks by kind, then by steps and starts. Unknown attacks are sorted like PGD."""
    kind = next((i for i, stem in enumerate(STRENGTH) if attack.startswith(stem)), STRENGTH.index("pgd"))
    return kind, [int(number) for number in re.findall(r"\d+", attack)]


def _num_classes(run: FinishedRun) -> int:
    """The number of classes, 0 if the run does not say."""
    numbers = [len(result.per_class) for result in run.evaluation.every_result()]
    return max([len(run.environment.class_counts), *numbers])


def _class_names(run: FinishedRun, which: str) -> list[str]:
    """The class names in a weights file; an empty list if the file is missing or does not have them."""
    path = run.path / "checkpoints" / f"{which}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("ltat_fast", "{}"))
        return JsonObject(path, card).take("class_names", list_of(is_text), [])
    except (SafetensorError, OSError, ValueError, UserError):
        return []


def summary(values: list[float], digits: int = 1) -> str:
    """Format "59.4"; over several seeds "59.4 ± 1.0"; without values "-"."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
