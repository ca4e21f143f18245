"""Analyse finished runs and write the numbers to RUN/analysis.json after each part (docs/analysis.md)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ltat_fast import config as configuration
from ltat_fast.analysis import parts as measures
from ltat_fast.analysis import table
from ltat_fast.analysis.parts import Subject
from ltat_fast.analysis.results import AnalysisFile, Part
from ltat_fast.config import Config
from ltat_fast.errors import UserError
from ltat_fast.files import refuse_read_only
from ltat_fast.models.libraries import is_foreign
from ltat_fast.models.precision import without_tf32
from ltat_fast.runs import log
from ltat_fast.runs.metrics import spread
from ltat_fast.runs.results import EvalFile, Identity, Result
from ltat_fast.runs.scores import fingerprint
from ltat_fast.runs.splits import DeviceImages, load_splits
from ltat_fast.runs.weights import load_model, weights_digest, weights_file
from ltat_fast.training import teachers
from ltat_fast.training.device import Hardware
from ltat_fast.training.evaluation import evaluate

PARTS = ("alignment", "linearity", "inequality", "corruptions", "classwise")
WITH_TEACHER = ("alignment", "linearity")  # parts whose numbers also depend on the teacher


@dataclass(frozen=True)
class Options:
    """Weights, images and teacher of the measurement."""

    teacher: str | None = None
    """compare with this teacher, named as in training, instead of the teacher of the run"""
    checkpoint: Literal["best", "last"] = "best"
    """weights to analyse"""
    limit: int | None = None
    """use only this many test images, spread evenly over the classes"""
    data_dir: Path | None = None
    """folder of the images, if they were moved since the run"""
    batch_size: int = 256
    """images per batch"""
    again: bool = False
    """measure also those parts again that are already in analysis.json"""


@dataclass
class Analysed:
    """A run under analysis. asked: for each part, everything besides the images that its numbers depend on."""

    run: Path
    which: str
    subject: Subject
    asked: dict[str, dict]
    test: DeviceImages

    @property
    def file(self) -> Path:
        return self.run / "analysis.json"

    @property
    def results(self) -> AnalysisFile:
        return AnalysisFile.load_or_empty(self.file)

    def is_known(self, part: str) -> bool:
        """Whether the file has the part for these weights and this test set on at least as many images."""
        known = self.results.of(self.which).get(part)
        return known is not None and known.is_of(self.asked[part], len(self.subject.labels))

    def keep(self, part: str, numbers: dict) -> None:
        """Write the numbers of a part to the file."""
        results = self.results
        measured = Part(numbers, len(self.subject.labels), self.asked[part])
        results.checkpoints.setdefault(self.which, {})[part] = measured
        results.save(self.file)

    def scores(self) -> dict[str, Result]:
        """The results for these weights in eval.json; clean and PGD-20 are measured if missing or on fewer images."""
        file, weights, images = self.run / "eval.json", self.asked["classwise"]["weights"], len(self.subject.labels)
        found = EvalFile.load_or_empty(file).of(self.which).results
        found = {attack: result for attack, result in found.items() if result.weights == weights}
        missing = [a for a in ("clean", "pgd20") if a not in found or (found[a].images or 0) < images]
        s, test = self.subject, self.test
        options = {"batch_size": s.batch_size, "limits": {"default": images}}
        return found | evaluate(s.model, test.images, test.labels, missing, s.groups, len(s.counts), s.eps, **options)


def analyse(folders: list[Path], parts: list[str], options: Options, hardware: Hardware) -> str:
    """Measure those ``parts`` that the runs in ``folders`` do not have yet, and return the table of all numbers."""
    for folder in folders:
        weights_file(folder, options.checkpoint)
    with without_tf32():
        analysed = [load(folder, parts, options, hardware) for folder in folders]
        for part in parts:
            for a in to_measure(part, analysed, options.again):
                refuse_read_only(a.run)
        for part in parts:
            measure(part, analysed, options.again)
    return table.render(options.checkpoint, [(a.run.name, a.results.numbers(a.which)) for a in analysed])


def parse_parts(names: str) -> list[str]:
    parts = [name.strip() for name in names.split(",") if name.strip()]
    for name in parts:
        configuration.choose("part", name, PARTS)
    if not parts:
        raise UserError(f"no part named: choose from {', '.join(PARTS)}")
    return parts


def load(folder: Path, parts: list[str], options: Options, hardware: Hardware) -> Analysed:
    """Load the network and the images of a run, and its teacher if one of ``parts`` needs it."""
    config, _ = configuration.load(folder)
    config = dataclasses.replace(config, out=folder, data_dir=options.data_dir or config.data_dir)
    data = load_splits(config, hardware.device)
    weights = weights_file(folder, options.checkpoint)
    model = load_model(weights, hardware.device, config.arch, data)
    name = (options.teacher or teacher_of(config)) if set(WITH_TEACHER) & set(parts) else None
    teacher = teachers.load(name, config.arch, data, hardware, config.activation) if name else None
    chosen = torch.from_numpy(spread(data.test.labels.cpu().numpy(), options.limit)).to(hardware.device)
    subject = Subject(
        model,
        data.test.images[chosen],
        data.test.labels[chosen],
        data.groups,
        data.counts,
        config.attack_config.eps,
        options.batch_size,
        teacher,
    )
    identity = Identity(weights_digest(weights), config.eps, fingerprint(data.test))
    asked = {part: dataclasses.asdict(identity) for part in PARTS}
    for part in WITH_TEACHER:
        asked[part]["teacher"] = name and (weights_digest(weights_file(Path(name))) if is_ours(name) else name)
    return Analysed(folder, options.checkpoint, subject, asked, data.test)


def teacher_of(config: Config) -> str | None:
    """The name of the teacher of a run: the one that the run trained itself, or else the one given by --teacher."""
    own = config.run_dir / "teacher"
    return str(own) if own.is_dir() else config.teacher


def is_ours(teacher: str) -> bool:
    """Whether ``teacher`` names a run or a weights file, not a network of another library."""
    return not is_foreign(teacher)


def to_measure(part: str, analysed: list[Analysed], again: bool) -> list[Analysed]:
    """The runs on which to measure ``part``: those that lack it (or all with ``again``) and can have it."""
    if part == "corruptions":
        compared = sorted({a.asked[part]["weights"] for a in analysed})
        for a in analysed:
            a.asked[part]["compared"] = compared
    todo = [a for a in analysed if again or not a.is_known(part)]
    return [a for a in todo if part != "alignment" or a.subject.teacher is not None]


def measure(part: str, analysed: list[Analysed], again: bool) -> None:
    """Measure ``part`` of every run that lacks it, and write it to the file of the run at once."""
    for a in analysed:
        if part == "alignment" and a.subject.teacher is None:
            log.say(f"{a.run}: no alignment, because it has no teacher; name one with --teacher")
    todo = to_measure(part, analysed, again)
    function = corruptions_on_common(analysed) if part == "corruptions" and todo else FUNCTIONS.get(part)
    for a in todo:
        log.say(f"{a.run}, {a.which}: {part} on {len(a.subject.labels)} test images")
        a.keep(part, function(a))


def corruptions_on_common(analysed: list[Analysed]) -> Callable[[Analysed], dict]:
    """Return the function that measures corruptions on the images that all ``analysed`` classify correctly."""
    first = analysed[0]
    for other in analysed[1:]:
        if other.asked["corruptions"]["test_set"] != first.asked["corruptions"]["test_set"]:
            raise UserError(f"corruptions compare runs on the same images, but {first.run} and {other.run} use others")
    common = torch.stack([measures.classified(a.subject) for a in analysed]).all(0)
    return lambda a: measures.corruption(a.subject, common)


def by_frequency(a: Analysed) -> dict:
    """Accuracy by class frequency. Raises UserError if eval.json does not fit the test set."""
    try:
        return measures.by_frequency(a.scores(), a.test.labels.cpu().numpy(), a.subject.counts)
    except (ValueError, IndexError) as error:
        raise UserError(f"{a.run / 'eval.json'} is damaged ({error}): remove it to measure again") from None


FUNCTIONS: dict[str, Callable[[Analysed], dict]] = {
    "alignment": lambda a: measures.alignment(a.subject),
    "linearity": lambda a: measures.linearity(a.subject),
    "inequality": lambda a: measures.inequality(a.subject),
    "classwise": by_frequency,
}
