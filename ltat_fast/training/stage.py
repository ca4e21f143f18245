"""One stage of a run, which trains the teacher or the student: the data of its training loop and its recovery."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from ltat_fast import seeding
from ltat_fast.attacks import AttackConfig, n_fgsm
from ltat_fast.config import Config
from ltat_fast.data import DeviceLoader
from ltat_fast.methods import Method, modifiers
from ltat_fast.methods.modifiers import OFF, Modifiers
from ltat_fast.schedule import learning_rate
from ltat_fast.training import distributed
from ltat_fast.training.step import trained_state


@dataclass(frozen=True)
class Selection:
    """How the best epoch of a stage is selected.

    evaluate: returns named numbers, in percent, for the present weights of the stage. after: takes an epoch, from 0,
    and returns whether to evaluate after it. by: the name of the number whose highest value marks the best epoch.
    """

    evaluate: Callable[[], dict[str, float]]
    after: Callable[[int], bool]
    by: str


@dataclass
class Stage:
    """What one stage trains. Its settings are those of ``config`` for the teacher or for the student.

    card: takes an epoch and returns the metadata of a weights file.
    """

    name: Literal["teacher", "student"]
    config: Config
    model: nn.Module
    method: Method
    loader: DeviceLoader
    card: Callable[[int], dict]
    selection: Selection | None = None
    modifiers: Modifiers = OFF

    @property
    def trained(self) -> nn.Module:
        """The network that the stage evaluates, saves and passes on: with ``--ema`` the average, else ``model``."""
        return self.modifiers.ema.model if self.modifiers.ema else self.model

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that a step changes besides ``model`` and the optimizer, by name."""
        return trained_state(self.method, self.modifiers)

    @property
    def epochs(self) -> int:
        return self.config.teacher_epochs if self.name == "teacher" else self.config.epochs

    @property
    def folder(self) -> Path:
        return stage_folder(self.config, self.name)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def state_file(self) -> Path:
        return state_file(self.config, self.name)

    @property
    def attack(self) -> AttackConfig:
        """The training attack."""
        return training_attack(self.config, self.method, self.name)

    @property
    def attacks_in_fp32(self) -> bool:
        """Whether the attack runs in float32, independent of the precision of the training step."""
        wanted = self.config.attack_precision
        return wanted == "fp32" or (wanted == "auto" and self.method.needs_fp32_attack)

    def rate(self, epoch: int, number: int) -> float:
        """Return the learning rate of step ``number`` of ``epoch``, both from 0."""
        return learning_rate(self.config.lr_schedule, self.config.lr, epoch, number, self.epochs, len(self.loader))

    def step_arguments(self, epoch: int, number: int) -> dict[str, float]:
        """Return the arguments of a step that do not depend on batch and weights, only on its place in the run."""
        world = distributed.current()
        # Each process draws noise for its own share of the batch, so its seed depends on its rank.
        rank = [world.rank] if world.size > 1 else []
        return {
            "lr": self.rate(epoch, number),
            "progress": (epoch + 1) / self.epochs,
            "seed": seeding.stream_seed(self.config.seed, self.name, "attack", *rank, epoch, number),
            **self.modifiers.strengths(epoch, number, self.epochs, len(self.loader)),
        }


def training_attack(config: Config, method: Method, stage: str = "student") -> AttackConfig:
    """Return the attack of a stage: PGD with the start noise of ``method`` or, for a student, N-FGSM if chosen."""
    if stage == "student" and config.attack == "n-fgsm":
        return n_fgsm(config.attack_config.eps)
    return replace(config.attack_config, noise=method.noise)


def build_modifiers(config: Config, method: Method, model: nn.Module, class_counts: Tensor) -> Modifiers:
    """Return the modifiers that ``config`` switches on, for a stage that trains ``model`` with ``method``.

    class_counts: int64 ``(C,)`` on the device of ``model``, images per class of the stage.
    """
    return modifiers.build(
        method,
        model,
        class_counts,
        awp=config.awp,
        awp_from=config.awp_from,
        ema=config.ema,
        eps_balance=config.eps_balance,
        eps_warmup=config.eps_warmup,
    )


def state_file(config: Config, name: str) -> Path:
    """Return the file of the state from which the stage ``name`` resumes."""
    return stage_folder(config, name) / "checkpoints" / "resume.safetensors"


def stage_folder(config: Config, name: str) -> Path:
    """Return the run folder for the student, and its subfolder "teacher" for the teacher."""
    return config.run_dir / "teacher" if name == "teacher" else config.run_dir
