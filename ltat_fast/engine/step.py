"""The training step as one object: attack on the frozen twin, the method's loss, backward, update.

Nothing in a step waits for the device: learning rate, progress and the sums to be logged are device tensors, and
:meth:`TrainStep.totals` is the one place that synchronises.
"""

import contextlib

import torch
from torch import Tensor, nn

from ltat_fast.attacks.pgd import AttackConfig, ascent_step, pgd
from ltat_fast.engine.device import Hardware
from ltat_fast.methods import Method
from ltat_fast.models.frozen import FrozenTwin


class TrainStep:
    """One step of ``method`` on ``model``.

    model: the live network, on ``hardware.device``; left in train mode.
    optimizer: any torch optimizer whose learning rate is a tensor.
    attack: the threat model of training.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        attack: AttackConfig,
        hardware: Hardware,
    ):
        self.model, self.method, self.optimizer, self.attack = model, method, optimizer, attack
        self.device, self.dtype = hardware.device, hardware.dtype
        self.frozen = frozen_for_attack(model, hardware)
        self.generator = torch.Generator(device=self.device)
        self.lr = optimizer.param_groups[0]["lr"]
        self.progress = torch.zeros((), device=self.device)
        self.count = torch.zeros((), dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.device)
        self.sums: dict[str, Tensor] = {}

    def __call__(self, x: Tensor, y: Tensor, *, lr: float, progress: float, seed: int) -> None:
        """x: float32 images in [0, 1]. y: int64 labels. seed: of the attack's start noise."""
        self.lr.fill_(lr)
        self.progress.fill_(progress)
        self.generator.manual_seed(seed)
        self._run(x, y)

    def _run(self, x: Tensor, y: Tensor) -> None:
        x_adv = self.perturb(x, y)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss, parts = self.method.loss(self.model, x, x_adv, y, self.progress)
        loss.backward()
        self.optimizer.step()
        self._record({"loss": loss.detach(), **parts})

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """The adversarial examples this step trains on."""
        self.frozen.refresh()
        with torch.no_grad():
            target = self.method.target(self.frozen, x, y)

        def objective(x_adv: Tensor, logits: Tensor) -> Tensor:
            return self.method.objective(x_adv, logits, target)

        def ascend(x: Tensor, x_adv: Tensor) -> Tensor:
            return ascent_step(self.frozen, x, x_adv, objective, self.attack)

        return pgd(self.frozen, x, objective, self.attack, self.generator, ascend)

    def _autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def _record(self, parts: dict[str, Tensor]) -> None:
        finite = torch.isfinite(parts["loss"])
        # Which step of the epoch went wrong first, found later without having waited for it here.
        self.first_bad = torch.where((self.first_bad < 0) & ~finite, self.count, self.first_bad)
        self.count += 1
        for name, value in parts.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.count)
            self.sums[name] += value

    def totals(self) -> dict[str, float]:
        """Sums over the steps since :meth:`restart`, ``steps`` among them, and ``first_bad`` (-1 if none). Syncs."""
        names = ["steps", "first_bad", *self.sums]
        values = torch.stack([self.count, self.first_bad, *self.sums.values()]).tolist()
        return dict(zip(names, values, strict=True))

    def restart(self, totals: dict[str, float] | None = None) -> None:
        """Begin an epoch: zero the sums, or set them to what an interrupted epoch had reached."""
        totals = dict(totals or {})
        self.count.fill_(totals.pop("steps", 0.0))
        self.first_bad.fill_(totals.pop("first_bad", -1.0))
        for name in totals.keys() | self.sums.keys():
            self.sums[name] = torch.full_like(self.count, totals.get(name, 0.0))


def frozen_for_attack(model: nn.Module, hardware: Hardware) -> FrozenTwin:
    """The twin that training attacks and teachers run on: in the training precision, batch norm folded."""
    return FrozenTwin(model, fold_bn=False)
