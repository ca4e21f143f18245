"""The state of an interrupted AutoAttack, in a file beside eval.json, so that the same command continues it."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltat_fast import __version__
from ltat_fast.errors import UserError
from ltat_fast.runs import log
from ltat_fast.runs.results import Identity
from ltat_fast.runs.weights import read_weights, write_weights


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """The files of the unfinished evaluations of one set of weights, in the folder of a run."""

    folder: Path
    identity: Identity

    def of(self, attack: str, places: Tensor, part: tuple[int, int], batch_size: int) -> "UnfinishedFile":
        """Return the file of ``attack``. places: int64 ``(N,)``, the attacked images. part: (rank, processes)."""
        rank, processes = part
        about = dataclasses.asdict(self.identity) | {
            "attack": attack,
            "images": hashlib.sha256(places.numpy()).hexdigest()[:16],
            "batch_size": batch_size,
            "part": [rank, processes],
            "versions": [__version__, torch.__version__],
        }
        return UnfinishedFile(self._path(attack, f"{rank}"), about)

    def remove(self, attack: str) -> None:
        """Remove the files of ``attack``, of all processes."""
        for path in self.folder.glob(self._path(attack, "*").name):
            path.unlink(missing_ok=True)

    def _path(self, attack: str, rank: str) -> Path:
        return self.folder / f".unfinished-{attack}-{self.identity.weights[:12]}-{rank}.safetensors"


@dataclasses.dataclass(frozen=True)
class UnfinishedFile:
    """A :class:`~ltat_fast.attacks.autoattack.Store`. about: what the state depends on; another state is not used."""

    path: Path
    about: dict[str, Any]

    def save(self, tensors: dict[str, Tensor], position: dict[str, Any]) -> None:
        """Write the state atomically, with a checksum."""
        write_weights(self.path, tensors, {"about": self.about, "position": position})

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state, or None if there is none, if it is damaged, or if it belongs to another evaluation."""
        if not self.path.exists():
            return None
        try:
            tensors, metadata = read_weights(self.path)
        except UserError as error:
            log.say(f"WARNING: {error}; the attack starts again")
            return None
        if metadata.get("about") != self.about:
            return None
        log.say(f"  {self.about['attack']}: continues where it was interrupted")
        return tensors, metadata["position"]
