"""Add results to RUN/eval.json while other processes may be writing to the same file."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ltat_fast.attacks.checks import Check
from ltat_fast.attacks.results import Identity, Result
from ltat_fast.errors import UserError
from ltat_fast.files import exclusive, refuse_read_only
from ltat_fast.runs import log
from ltat_fast.runs.metrics import on_most_images, worst_case
from ltat_fast.runs.results import CHECKS, CheckpointResults, EvalFile, RecordedCheck
from ltat_fast.runs.splits import DeviceImages
from ltat_fast.runs.threats import attack_of


def fingerprint(images: DeviceImages) -> str:
    """16 hexadecimal digits that identify a set of images and labels."""
    digest = hashlib.sha256(repr(tuple(images.images.shape)).encode())
    for index in torch.arange(len(images)).split(1024):  # the images may be larger than the memory
        digest.update(images.images[index].cpu().contiguous().numpy())
    digest.update(images.labels.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@dataclass
class Scores:
    """The results in ``file`` of one ``identity``, stored under each of ``checkpoints``.

    suffix: ends the names of the results, "@2/255" for example, if the ball is not that of the run. Accuracy without
    attack does not depend on the ball, so its name never has a suffix.

    A result is known if it has this identity and says which images were correct. Results of earlier versions do not
    say so; they stay in the file and are measured again when they are asked for.
    """

    file: Path
    identity: Identity
    checkpoints: list[str]
    test: DeviceImages
    groups: dict[str, list[int]]
    num_classes: int
    suffix: str = ""

    def name(self, attack: str) -> str:
        """Return the name of the result of ``attack``."""
        return attack if attack == "clean" else attack + self.suffix

    def known(self, attack: str, images: int) -> Result | None:
        """The known result of ``attack`` on the most images, or None if these are fewer than ``images``.

        Raises UserError instead of returning None if the run folder is read-only, so that no measurement is lost.
        """
        evaluated = EvalFile.load_or_empty(self.file).checkpoints.values()
        ours = [
            found
            for part in evaluated
            if (found := part.results.get(self.name(attack))) and self._is_known(attack, found)
        ]
        most = max(ours, key=lambda result: result.images, default=None)
        if most and most.images >= images:
            return most
        refuse_read_only(self.file.parent)
        return None

    def known_checks(self) -> tuple[RecordedCheck, ...] | None:
        """The checks of these weights, if they were run. Raises UserError as :meth:`known` does."""
        for part in EvalFile.load_or_empty(self.file).checkpoints.values():
            if part.checks and self._are_of_these_weights(part.checks):
                return part.checks
        refuse_read_only(self.file.parent)
        return None

    def add(self, attack: str, result: Result) -> None:
        """Add the result of an attack, and update the worst case over the known results that share the most images."""

        def change(part: CheckpointResults) -> None:
            part.entries[self.name(attack)] = result if self._is_known(attack, result) else result.of(self.identity)
            if not self._are_of_these_weights(part.checks):
                del part.entries[CHECKS]
            worst = self.name("worst")
            part.entries.pop(worst, None)
            if comparable := on_most_images(self.known_among(part), len(self.test)):
                combined = worst_case(comparable, self.test.labels, self.groups, self.num_classes)
                part.entries[worst] = combined.of(self.identity)

        self._merge(change)

    def add_checks(self, checks: Sequence[Check]) -> None:
        """Add what the checks of these weights found."""
        found = [(check.name, check.passed, check.value, check.detail) for check in checks]
        recorded = tuple(RecordedCheck(*values, self.identity.weights) for values in found)
        self._merge(lambda part: part.entries.update({CHECKS: recorded}))

    def known_among(self, part: CheckpointResults) -> dict[str, Result]:
        """Return the known results of ``part`` in this ball, by attack."""
        found = {attack_of(name): result for name, result in part.results.items() if self._is_named(name)}
        return {attack: result for attack, result in found.items() if self._is_known(attack, result)}

    def all_known(self) -> dict[str, Result]:
        """Return the known results in the file, by attack."""
        content = EvalFile.load_or_empty(self.file)
        return self.known_among(content.of(self.checkpoints[0]))

    def _is_named(self, name: str) -> bool:
        return name == self.name(attack_of(name))

    def _is_known(self, attack: str, result: Result) -> bool:
        if attack == "clean":  # in every ball
            result = dataclasses.replace(result, eps=self.identity.eps, norm=self.identity.norm)
        return result.is_of(self.identity) and result.correct is not None

    def _are_of_these_weights(self, checks: Sequence[RecordedCheck]) -> bool:
        return all(check.weights == self.identity.weights for check in checks)

    def _merge(self, change: Callable[[CheckpointResults], None]) -> None:
        """Read, change and write the file under a lock, so that no process overwrites another's results."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks
                stack.enter_context(exclusive(self.file.with_name(f".{self.file.name}.lock"), log.say))
            content = EvalFile.load_or_empty(self.file)
            before = content.to_json()
            try:
                for which in self.checkpoints:
                    change(content.checkpoints.setdefault(which, CheckpointResults()))
            except ValueError as error:  # "chosen" does not fit the size of the test set
                raise UserError(f"{self.file} is damaged ({error}): remove it to evaluate again") from None
            if content.to_json() != before:
                content.save(self.file)
