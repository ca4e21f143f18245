"""What one stage of a run trains, the teacher's or the student's: everything its loop and its recovery need to know."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ltat_fast import seeding
from ltat_fast.attacks.pgd import AttackConfig
from ltat_fast.data import DeviceLoader
from ltat_fast.methods import Method
from ltat_fast.schedule import learning_rate
from ltat_fast.training import distributed

# Evaluates the model as it stands: flat names to numbers.
Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass
class Stage:
    """What one stage trains, and how."""

    name: str
    folder: Path
    model: nn.Module
    arch: str
    method: Method
    loader: DeviceLoader
    attack: AttackConfig
    epochs: int
    lr: float
    lr_schedule: str
    momentum: float
    weight_decay: float
    seed: int
    card: Callable[[int], dict]
    """epoch to the metadata of a weights file"""
    evaluate: Evaluate | None = None
    evaluate_when: Callable[[int], bool] = field(default=lambda epoch: False)
    """epoch, from 0, to whether it is evaluated"""
    select_by: str = ""
    """which of the evaluated numbers picks the best epoch"""
    backend: str = "auto"
    attack_fp32: bool = False
    """attack in float32, whatever the precision of the training step"""
    max_steps: int | None = None
    save_minutes: float = 10.0
    on_nan: str = "stop"
    """"rollback": go on once from the last good state, without the batch that gave a number that is not finite"""

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def state_file(self) -> Path:
        return self.checkpoints / "resume.safetensors"

    def rate(self, epoch: int, number: int) -> float:
        """The learning rate of step ``number`` of ``epoch``, both from 0."""
        return learning_rate(self.lr_schedule, self.lr, epoch, number, self.epochs, len(self.loader))

    def step_arguments(self, epoch: int, number: int) -> dict[str, float]:
        """What a step depends on besides its batch and the weights: a function of its place alone."""
        world = distributed.current()
        # Noise is drawn for a process's share of the batch: each needs draws of its own.
        noise = (self.seed, self.name, "attack", *([world.rank] if world.size > 1 else []))
        return {
            "lr": self.rate(epoch, number),
            "progress": (epoch + 1) / self.epochs,
            "seed": seeding.stream_seed(*noise, epoch, number),
        }
