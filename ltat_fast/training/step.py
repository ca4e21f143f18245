"""The training step as one object: attack on the frozen twin, the method's loss, backward, update.

Nothing in a step waits for the device: learning rate, progress and the sums to be logged are device tensors, and
:meth:`TrainStep.totals` is the one place that synchronises. Three backends run the same step:

- eager: operator by operator;
- step: the ascent step (forward, input gradient, projection) and the student's forward and backward through
  ``torch.compile``;
- graph: all of the step, captured once as one CUDA graph and replayed.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ltat_fast.attacks.pgd import AttackConfig, ascent_step, pgd
from ltat_fast.methods import Method
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.ops import pgd_step
from ltat_fast.training import distributed
from ltat_fast.training.device import Hardware

BACKENDS = ("eager", "step", "graph")
WARM_UP_STEPS = 3  # before a capture: compiles, picks convolution algorithms, fills the allocator


def frozen_twin(model: nn.Module, hardware: Hardware) -> FrozenTwin:
    """The twin that training attacks and teachers run on: batch norm folded, NHWC, in the training precision."""
    dtype = None if hardware.dtype == torch.float32 else hardware.dtype
    return FrozenTwin(model, fold_bn=True, dtype=dtype, channels_last=True)


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD in one fused kernel, its learning rate a tensor so that a captured step can follow a schedule.

    Momentum buffers exist from the start, at zero, which gives the same first update as creating them in it: the state
    of the optimizer then has fixed addresses.
    """
    device = next(model.parameters()).device
    lr_tensor = torch.tensor(lr, dtype=torch.float32, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr_tensor, momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


class TrainStep:
    """One step of ``method`` on ``model``.

    model: the live network, on ``hardware.device``; left in train mode.
    optimizer: as :func:`make_optimizer` makes it.
    attack: the threat model of training.
    backend: one of :data:`BACKENDS`.
    train_model: what the loss calls in place of ``model``, e.g. its DistributedDataParallel wrapper.
    twin: what the attack runs on, if not :func:`frozen_twin`; to measure what each part of that one brings.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optimizer: torch.optim.Optimizer,
        attack: AttackConfig,
        hardware: Hardware,
        backend: str = "eager",
        train_model: nn.Module | None = None,
        twin: FrozenTwin | None = None,
    ):
        self.model, self.method, self.optimizer, self.attack = model, method, optimizer, attack
        self.device, self.dtype, self.backend = hardware.device, hardware.dtype, backend
        self.frozen = twin or frozen_twin(model, hardware)
        self.generator = torch.Generator(device=self.device)
        self.lr = optimizer.param_groups[0]["lr"]
        self.progress = torch.zeros((), device=self.device)
        self.count = torch.zeros((), dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.device)
        self.sums: dict[str, Tensor] = {}

        self._ascend: Callable = self._ascend_eager
        self._student: Callable = train_model or model
        self._graph: torch.cuda.CUDAGraph | None = None
        if backend in ("step", "graph"):
            self._ascend = torch.compile(self._ascend_traced, fullgraph=True, dynamic=False)
            if not method.needs_double_backward:
                self._student = torch.compile(self._student, dynamic=False)

    def __call__(self, x: Tensor, y: Tensor, *, lr: float, progress: float, seed: int) -> None:
        """x: float32 images in [0, 1]. y: int64 labels. seed: of the attack's start noise."""
        self.lr.fill_(lr)
        self.progress.fill_(progress)
        self.generator.manual_seed(seed)
        if self.backend != "graph":
            self._run(x, y)
            return
        if self._graph is None:
            self._capture(x, y)
            self.generator.manual_seed(seed)
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()

    def _run(self, x: Tensor, y: Tensor) -> None:
        self.frozen.refresh()
        x_adv = self.perturb(x, y)
        self.model.train()
        loss, parts = self.method.update(self.model, self.optimizer, lambda: self.loss(x, x_adv, y))
        self._record({"loss": loss, **parts})

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """The adversarial examples of a step, against the weights of the last :meth:`FrozenTwin.refresh`."""
        if not self.method.uses_attack:
            return x
        with torch.no_grad():
            target = self.method.target(self.frozen, x, y)

        def step(x: Tensor, x_adv: Tensor) -> Tensor:
            return self._ascend(x, x_adv, target)

        return pgd(self.frozen, x, None, self.attack, self.generator, step)

    def _ascend_eager(self, x: Tensor, x_adv: Tensor, target: Tensor) -> Tensor:
        def objective(point: Tensor, logits: Tensor) -> Tensor:
            return self.method.objective(point, logits, target)

        return ascent_step(self.frozen, x, x_adv, objective, self.attack)

    def _ascend_traced(self, x: Tensor, x_adv: Tensor, target: Tensor) -> Tensor:
        """The same; func.grad is traced with the forward into one graph, where autograd.grad would break it."""

        def objective(point: Tensor) -> Tensor:
            return self.method.objective(point, self.frozen(point), target)

        grad = torch.func.grad(objective)(x_adv)
        return pgd_step(x_adv, grad, x, self.attack.step_size, self.attack.eps)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's loss in the training precision; the backward pass belongs outside of autocast."""
        reduced = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype) if reduced else contextlib.nullcontext():
            return self.method.loss(self._student, x, x_adv, y, self.progress)

    def _record(self, parts: dict[str, Tensor]) -> None:
        finite = torch.isfinite(parts["loss"])
        # Which step of the epoch went wrong first, found later without having waited for it here.
        self.first_bad.copy_(torch.where((self.first_bad < 0) & ~finite, self.count, self.first_bad))
        self.count += 1
        for name, value in parts.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.count)
            self.sums[name] += value

    def totals(self) -> dict[str, float]:
        """Sums over the steps since :meth:`restart`, ``steps`` among them, and ``first_bad`` (-1 if none).

        Means over all processes, which must all call it. Waits for the device.
        """
        sums = distributed.mean_over_processes(torch.stack([self.count, *self.sums.values()]))
        first_bad = distributed.largest_of_processes(self.first_bad.clone())
        names = ["first_bad", "steps", *self.sums]
        return dict(zip(names, torch.cat([first_bad[None], sums]).tolist(), strict=True))

    def restart(self, totals: dict[str, float] | None = None) -> None:
        """Begin an epoch: zero the sums, or set them to what an interrupted epoch had reached."""
        totals = dict(totals or {})
        self.count.fill_(totals.pop("steps", 0.0))
        self.first_bad.fill_(totals.pop("first_bad", -1.0))
        for name in [*self.sums, *totals]:
            # In place where it exists: a captured step adds to this very tensor.
            self.sums.setdefault(name, torch.zeros_like(self.count)).fill_(totals.get(name, 0.0))

    def _capture(self, x: Tensor, y: Tensor) -> None:
        """Record the step as a CUDA graph. The warm-up trains for real, so what it changed is put back afterwards."""
        self._x, self._y = x.clone(memory_format=torch.preserve_format), y.clone()
        put_back = self.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_STEPS):
                    self._run(self._x, self._y)
        finally:  # the weights are put back, by whom it may be, only after what was begun is over
            torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=stream):
            self._run(self._x, self._y)
        put_back()
        self._graph = graph

    def trial(self, x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, float]:
        """Adversarial examples and loss of one step that leaves everything as it was: to compare backends with."""
        put_back = self.snapshot()
        self.restart()
        try:
            self(x, y, lr=float(self.lr), progress=1.0, seed=seed)
            loss = self.totals()["loss"]
        finally:  # a backend may fail half-way, and the run goes on without it
            put_back()
        self.frozen.refresh()
        self.generator.manual_seed(seed)
        return self.perturb(x, y), loss

    def snapshot(self) -> Callable[[], None]:
        """Copy every tensor that a step changes; the function returned puts them back, each where it lies."""
        momenta = [buffer for state in self.optimizer.state.values() for buffer in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), *momenta, *self.method.state().values()]
        tensors = [tensor.detach() for tensor in [*tensors, self.count, self.first_bad, *self.sums.values()]]
        saved = [(tensor, tensor.clone()) for tensor in tensors]
        known_sums = set(self.sums)

        def put_back() -> None:
            for tensor, before in saved:
                tensor.copy_(before)
            for name in self.sums.keys() - known_sums:
                self.sums[name].zero_()

        return put_back
