"""Analyse: what the papers measure of a finished run besides its accuracy, into RUN/analysis.json.

python -m ltat_fast.analyse RUN... [--teacher PATH] [--parts alignment,linearity]     # docs/analysis.md
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from ltat_fast import config as configuration
from ltat_fast.analysis import parts as measures
from ltat_fast.analysis import table
from ltat_fast.analysis.parts import Subject
from ltat_fast.config import Config, ratio
from ltat_fast.engine import device, log, teachers
from ltat_fast.engine import run as runs
from ltat_fast.engine.device import Hardware
from ltat_fast.engine.evaluation import evaluate, float32_without_shortcuts, spread
from ltat_fast.engine.files import refuse_read_only
from ltat_fast.engine.results import read_json, read_results
from ltat_fast.engine.run import Images
from ltat_fast.engine.scores import fingerprint
from ltat_fast.errors import UserError, exit_on_user_error

PARTS = ("alignment", "linearity", "inequality", "corruptions", "classwise")
OF_TEACHER = ("alignment", "linearity")  # their numbers depend on the teacher too


@dataclass(frozen=True)
class Arguments:
    """Alignment with the teacher, local linearity, inequality, corruptions, accuracy by frequency of class."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; corruptions are measured on the images that all of them classify correctly"""
    teacher: str | None = None
    """compare with this teacher, named as for training, instead of each run's own"""
    checkpoint: Literal["best", "last"] = "best"
    """which weights"""
    parts: str = ",".join(PARTS)
    """comma-separated"""
    limit: int | None = None
    """use this many test images only, spread evenly over the classes"""
    data_dir: Path | None = None
    """where the images are now, if not where the runs found them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    batch_size: int = 256
    """images at a time"""
    again: bool = False
    """measure parts whose numbers are already there once more"""


@dataclass
class Analysed:
    """A run under analysis. asked: what its numbers depend on besides the images, by part."""

    run: Path
    which: str
    subject: Subject
    asked: dict[str, dict]
    test: Images

    @property
    def file(self) -> Path:
        return self.run / "analysis.json"

    @property
    def results(self) -> dict:
        return read(self.file) if self.file.exists() else {}

    def is_known(self, part: str) -> bool:
        """Whether the numbers are there, for these weights, this test set and at least as many images."""
        known = self.results.get(self.which, {}).get(part)
        return bool(known and self.asked[part].items() <= known.items() and known["images"] >= len(self.subject.labels))

    def keep(self, part: str, numbers: dict) -> None:
        results = self.results
        entry = numbers | {"images": len(self.subject.labels)} | self.asked[part]
        results.setdefault(self.which, {})[part] = entry
        log.write_json(self.file, results)

    def scores(self) -> dict:
        """What eval.json has for these weights; clean and PGD-20 are measured where it has fewer images."""
        file, weights, images = self.run / "eval.json", self.asked["classwise"]["weights"], len(self.subject.labels)
        found = read_results(file).get(self.which, {}) if file.exists() else {}
        found = {name: s for name, s in found.items() if isinstance(s, dict) and s.get("weights") == weights}
        missing = [a for a in ("clean", "pgd20") if found.get(a, {}).get("images", 0) < images]
        s, test = self.subject, self.test
        options = {"batch_size": s.batch_size, "limits": {"default": images}}
        return found | evaluate(s.model, test.images, test.labels, missing, s.groups, len(s.counts), s.eps, **options)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.analyse", args=argv)
    parts = parse_parts(arguments.parts)
    if not arguments.runs:
        raise UserError("name at least one run folder")
    for name in ("limit", "batch_size"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    hardware = device.choose(arguments.device, "fp32")
    folders = list(dict.fromkeys(arguments.runs))
    for folder in folders:
        runs.weights_in(folder, arguments.checkpoint)
    with float32_without_shortcuts():
        analysed = [load(folder, parts, arguments, hardware) for folder in folders]
        for part in parts:
            for a in to_measure(part, analysed, arguments.again):
                refuse_read_only(a.run)
        for part in parts:
            measure(part, analysed, arguments.again)
    log.say(table.render(arguments.checkpoint, [(a.run.name, a.results.get(a.which, {})) for a in analysed]))


def read(file: Path) -> dict:
    """The content of an analysis.json, by checkpoint and part. Raises UserError if it is damaged."""
    results = read_json(file)
    for which, parts in results.items():
        if not isinstance(parts, dict):
            raise UserError(f"{file} is damaged: {which} is not a JSON object")
        for part, numbers in parts.items():
            if not (isinstance(numbers, dict) and type(numbers.get("images")) is int):
                raise UserError(f"{file} is damaged: {which}, {part} is not a JSON object with a number of images")
        try:
            table.render(which, [(file.parent.name, parts)])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise UserError(f"{file} is damaged: {which} has something else where numbers are expected") from None
    return results


def parse_parts(names: str) -> list[str]:
    parts = [name.strip() for name in names.split(",") if name.strip()]
    for name in parts:
        configuration.choose("part", name, PARTS)
    if not parts:
        raise UserError(f"no part named: choose from {', '.join(PARTS)}")
    return parts


def load(folder: Path, parts: list[str], arguments: Arguments, hardware: Hardware) -> Analysed:
    """The run's network, its teacher if ``parts`` look at it, and the images, as ``arguments`` want them."""
    config, _ = configuration.load(folder)
    config = dataclasses.replace(config, out=folder, data_dir=arguments.data_dir or config.data_dir)
    data = runs.load_data(config, hardware.device)
    weights = runs.weights_in(folder, arguments.checkpoint)
    model = runs.load_model(weights, hardware.device, config.arch, data)
    name = (arguments.teacher or teacher_of(config)) if set(OF_TEACHER) & set(parts) else None
    teacher = teachers.load(name, config.arch, data, hardware) if name else None
    chosen = torch.from_numpy(spread(data.test.labels.cpu().numpy(), arguments.limit)).to(hardware.device)
    subject = Subject(
        model,
        data.test.images[chosen],
        data.test.labels[chosen],
        data.groups,
        data.counts,
        ratio(config.eps),
        arguments.batch_size,
        teacher,
    )
    identity = {"weights": runs.weights_digest(weights), "eps": config.eps, "test_set": fingerprint(data.test)}
    asked = {part: dict(identity) for part in PARTS}
    for part in OF_TEACHER:
        asked[part]["teacher"] = name and (runs.weights_digest(runs.weights_in(Path(name))) if is_ours(name) else name)
    return Analysed(folder, arguments.checkpoint, subject, asked, data.test)


def teacher_of(config: Config) -> str | None:
    """The teacher a run was trained with: its own, else the one it was given."""
    own = config.run_dir / "teacher"
    return str(own) if own.is_dir() else config.teacher


def is_ours(teacher: str) -> bool:
    return teacher.partition(":")[0] not in teachers.KINDS


def to_measure(part: str, analysed: list[Analysed], again: bool) -> list[Analysed]:
    """Those that do not have ``part``, or all if it is to be measured ``again``, without those that cannot have it."""
    if part == "corruptions":
        compared = sorted({a.asked[part]["weights"] for a in analysed})
        for a in analysed:
            a.asked[part]["compared"] = compared
    todo = [a for a in analysed if again or not a.is_known(part)]
    return [a for a in todo if part != "alignment" or a.subject.teacher is not None]


def measure(part: str, analysed: list[Analysed], again: bool) -> None:
    """Measure ``part`` of every run that does not have it, and keep each as soon as it is there."""
    for a in analysed:
        if part == "alignment" and a.subject.teacher is None:
            log.say(f"{a.run}: no alignment, because it has no teacher; name one with --teacher")
    todo = to_measure(part, analysed, again)
    function = corruptions_on_common(analysed) if part == "corruptions" and todo else FUNCTIONS.get(part)
    for a in todo:
        log.say(f"{a.run}, {a.which}: {part} on {len(a.subject.labels)} test images")
        a.keep(part, function(a))


def corruptions_on_common(analysed: list[Analysed]) -> Callable[[Analysed], dict]:
    """What measures a run's corruptions on the images all ``analysed`` classify correctly."""
    first = analysed[0]
    for other in analysed[1:]:
        if not torch.equal(first.test.images, other.test.images):
            raise UserError(f"corruptions compare runs on the same images: {first.run} and {other.run} have others")
    common = torch.stack([measures.classified(a.subject) for a in analysed]).all(0)
    return lambda a: measures.corruption(a.subject, common)


def by_frequency(a: Analysed) -> dict:
    try:
        return measures.by_frequency(a.scores(), a.test.labels.cpu().numpy(), a.subject.counts)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{a.run / 'eval.json'} is damaged ({error}): remove it to measure afresh") from None


FUNCTIONS: dict[str, Callable[[Analysed], dict]] = {
    "alignment": lambda a: measures.alignment(a.subject),
    "linearity": lambda a: measures.linearity(a.subject),
    "inequality": lambda a: measures.inequality(a.subject),
    "classwise": by_frequency,
}


if __name__ == "__main__":
    main()
