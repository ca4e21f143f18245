"""RUN/eval.json: what is known of each checkpoint, and how a new result joins it while others may be writing too."""

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ltat_fast.errors import UserError
from ltat_fast.files import exclusive, refuse_read_only, write_json
from ltat_fast.runs import log
from ltat_fast.runs.metrics import on_most_images, worst_case
from ltat_fast.runs.results import read_results
from ltat_fast.runs.splits import DeviceImages


def fingerprint(images: DeviceImages) -> str:
    """16 hexadecimal digits that tell one set of images and labels from another."""
    digest = hashlib.sha256(repr(tuple(images.images.shape)).encode())
    for tensor in (images.images, images.labels):
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


@dataclass
class Scores:
    """The results in ``file`` for the weights, eps and test set of ``identity``, kept under each of ``checkpoints``.

    A result counts as known if all of ``identity`` is in it and it says which images were correct; results of earlier
    versions do not, and are measured again when asked for.
    """

    file: Path
    identity: dict[str, str]
    checkpoints: list[str]
    test: DeviceImages
    groups: dict[str, list[int]]
    num_classes: int

    def known(self, attack: str, images: int) -> dict | None:
        """The result of ``attack`` on the most images, if they are so many, whichever checkpoint it was found for.

        Raises UserError if there is none and what is measured now could not be put in.
        """
        ours = [entry[attack] for entry in self._read().values() if self._is_ours(entry.get(attack))]
        most = max(ours, key=lambda result: result["images"], default=None)
        if most and most["images"] >= images:
            return most
        refuse_read_only(self.file.parent)
        return None

    def known_checks(self) -> list[dict] | None:
        """What the checks found on these weights. Raises as :meth:`known` does."""
        for entry in self._read().values():
            if (checks := entry.get("checks")) and all(map(self._is_checked, checks)):
                return checks
        refuse_read_only(self.file.parent)
        return None

    def add(self, attack: str, result: dict) -> None:
        """Put in the result of an attack, and the worst case anew over those known of the most images."""

        def change(entry: dict) -> None:
            entry[attack] = result | self.identity
            if not all(map(self._is_checked, entry.get("checks", []))):
                del entry["checks"]
            entry.pop("worst", None)
            ours = {name: e for name, e in entry.items() if self._is_ours(e)}
            if comparable := on_most_images(ours, len(self.test)):
                entry["worst"] = worst_case(comparable, self.test.labels, self.groups, self.num_classes) | self.identity

        self._merge(change)

    def add_checks(self, checks: list[dict]) -> None:
        """Put in what the checks found."""
        weights = {"weights": self.identity["weights"]}
        self._merge(lambda entry: entry.update(checks=[check | weights for check in checks]))

    def _is_ours(self, entry) -> bool:
        needed = {"correct", "images"}
        return isinstance(entry, dict) and self.identity.items() <= entry.items() and needed <= entry.keys()

    def _is_checked(self, check: dict) -> bool:
        return check.get("weights") == self.identity["weights"]

    def _read(self) -> dict:
        return read_results(self.file) if self.file.exists() else {}

    def _merge(self, change: Callable[[dict], None]) -> None:
        """Read, change and write with the file to ourselves, so that no two processes undo each other's results."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # a file system without locks
                stack.enter_context(exclusive(self.file.with_name(f".{self.file.name}.lock"), log.say))
            results = self._read()
            before = copy.deepcopy(results)
            try:
                for which in self.checkpoints:
                    change(results.setdefault(which, {}))
            except (ValueError, TypeError) as error:
                raise UserError(f"{self.file} is damaged ({error}): remove it to evaluate afresh") from None
            if results != before:
                write_json(self.file, results)
