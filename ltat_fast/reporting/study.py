"""What may be compared with what: experiments on the same images, with the same network and the same radius."""

import json
import re
from dataclasses import dataclass
from statistics import mean, stdev

from safetensors import SafetensorError, safe_open

from ltat_fast.data.longtail import class_groups
from ltat_fast.errors import UserError
from ltat_fast.runs.experiments import Experiment, comparable_worst
from ltat_fast.runs.finished import FinishedRun, RunConfig
from ltat_fast.runs.json_object import JsonObject, is_text, list_of

# The spelling of names that are not plain capitals.
NAMES = {"natural": "Natural", "robal": "RoBal", "adaad": "AdaAD", "adaiad": "AdaIAD"}
ATTACK_NAMES = {
    "clean": "no attack",
    "autoattack": "AutoAttack",
    "autoattack-plus": "AutoAttack plus",
    "autoattack-rand": "AutoAttack rand",
    "worst": "all attacks together",
}
STRENGTH = ("clean", "fgsm", "pgd", "scaled-pgd", "cw", "autoattack", "worst")


def attack_name(attack: str) -> str:
    """ "pgd20" to "PGD-20", "pgd20x5" to "PGD-20 from 5 starts"."""
    name, _, starts = attack.partition("x") if re.search(r"\dx\d", attack) else (attack, "", "")
    name = ATTACK_NAMES.get(name) or re.sub(r"([a-z])(\d)", r"\1-\2", name).upper()
    return f"{name} from {starts} starts" if starts else name


def method_name(experiment: Experiment) -> str:
    method = experiment.config.method
    return NAMES.get(method, method.upper())


@dataclass(frozen=True)
class Study:
    """Experiments that may be compared.

    checkpoint and attack: what headline and plots are of; the attack is the strongest of those run on most images.
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
        """Training images of each class, if a run says."""
        return next((list(counts) for run in self.runs if (counts := run.environment.class_counts)), None)

    @property
    def groups(self) -> dict[str, list[int]]:
        return class_groups(self.counts) if self.counts else {}

    @property
    def num_classes(self) -> int:
        return max(map(_num_classes, self.runs))

    def by_frequency(self) -> list[int]:
        """The classes, the most frequent in training first; as they are numbered where the counts are not known."""
        counts = self.counts or [0] * self.num_classes
        return sorted(range(self.num_classes), key=lambda c: (-counts[c], c))

    def class_names(self) -> list[str]:
        """As a weights file of the study knows them, else their numbers."""
        for run in self.runs:
            names = _class_names(run, self.checkpoint)
            if len(names) == self.num_classes:
                return names
        return [str(c) for c in range(self.num_classes)]

    def attacks(self) -> list[str]:
        """Every attack a run was evaluated under, "clean" first."""
        evaluated = [part for run in self.runs for part in run.evaluation.checkpoints.values()]
        return sorted(dict.fromkeys(name for part in evaluated for name in part.results), key=_strength)


def studies(found: list[Experiment]) -> list[Study]:
    """The experiments, those that may be compared together, in the order given."""
    alike: dict[str, list[Experiment]] = {}
    for experiment in found:
        c = experiment.config
        classes, images = max(map(_num_classes, experiment.runs)), experiment.runs[0].environment.index_hash
        key = [c.dataset, c.imbalance_ratio, c.arch, c.eps, classes, images]
        alike.setdefault(json.dumps(key), []).append(experiment)
    return [_study(tuple(group)) for group in alike.values()]


def _study(group: tuple[Experiment, ...]) -> Study:
    """Plots are of "best" only if it was picked on images of its own: picked on the test set it is optimistic."""
    held_out = all(e.config.select_on == "heldout" and "best" in e.checkpoints() for e in group)
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
    """The kind of attack, then its steps and starts; an unknown one is taken for a PGD."""
    kind = next((i for i, stem in enumerate(STRENGTH) if attack.startswith(stem)), STRENGTH.index("pgd"))
    return kind, [int(number) for number in re.findall(r"\d+", attack)]


def _num_classes(run: FinishedRun) -> int:
    """The number of classes, 0 if the run does not say."""
    numbers = [len(result.per_class) for result in run.evaluation.every_result()]
    return max([len(run.environment.class_counts), *numbers])


def _class_names(run: FinishedRun, which: str) -> list[str]:
    """The names of the classes in a weights file; none if the file is not there or does not have them."""
    path = run.path / "checkpoints" / f"{which}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get("ltat_fast", "{}"))
        return JsonObject(path, card).take("class_names", list_of(is_text), [])
    except (SafetensorError, OSError, ValueError, UserError):
        return []


def summary(values: list[float], digits: int = 1) -> str:
    """ "59.4", over several seeds "59.4 ± 1.0"; "-" of none."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")
