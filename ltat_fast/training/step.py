"""One training step as an object: attack on the frozen twin, the method's loss, backward, update.

A step never waits for the device. The learning rate, the progress of the run and the logged sums are device tensors;
:meth:`TrainStep.totals` is the only method that synchronises. Three backends run the same step:

- eager: operator by operator;
- step: the attack step (forward, input gradient, projection) and the student's forward and backward pass are compiled
  by ``torch.compile``;
- graph: the whole compiled step is captured once as a CUDA graph and replayed. A method that begins without attack has
  a second graph for those steps.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
import torch._inductor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ltat_fast.attacks.pgd import AttackConfig, ascend_from, make_ascend, random_start
from ltat_fast.methods import Method, MethodContext
from ltat_fast.methods.base import Model, Parts
from ltat_fast.methods.modifiers import OFF, Modifiers
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.fused_conv import is_supported
from ltat_fast.models.joint_batch import check_joint_calls, joint_calls
from ltat_fast.models.sync_batch_norm import unknown_batch_norm
from ltat_fast.runs import log
from ltat_fast.training import distributed
from ltat_fast.training.cuda_graph import capture
from ltat_fast.training.device import Hardware
from ltat_fast.training.micro_batches import OutputsFirst, backward_coupled, backward_each, join, split

BACKENDS = ("eager", "step", "graph")
WARM_UP_STEPS = 3  # before a capture: compile, choose convolution algorithms, fill the allocator


def frozen_twin(model: nn.Module, hardware: Hardware) -> FrozenTwin:
    """Return the twin for training attacks and teachers: batch norm folded, NHWC, in the training precision.

    The fused ReLU and the padded stem are only used on GPUs. On a CPU, in float32 and in bfloat16, the fused calls took
    2 to 25 % more time than separate ones.
    """
    dtype = None if hardware.dtype == torch.float32 else hardware.dtype
    on_gpu = hardware.device.type == "cuda"
    return FrozenTwin(
        model,
        fold_bn=True,
        dtype=dtype,
        channels_last=True,
        fuse_relu=on_gpu and is_supported(hardware.device, hardware.dtype),
        pad_stem=on_gpu,
    )


def make_optimizer(model: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """Return SGD in one fused kernel. Its learning rate is a tensor, so that a captured step can follow a schedule.

    The momentum buffers exist from the start, with value zero, so that the optimizer's state has fixed addresses. The
    first update is the same as with buffers created during it.
    """
    device = next(model.parameters()).device
    lr_tensor = torch.tensor(lr, dtype=torch.float32, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr_tensor, momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def trained_state(method: Method, modifiers: Modifiers) -> dict[str, Tensor]:
    """Return the tensors that a step changes besides the network, the momentum and the sums, by name."""
    state = {f"method.{name}": tensor for name, tensor in method.state().items()}
    return state | {f"average.{name}": tensor for name, tensor in modifiers.state().items()}


@dataclass(frozen=True)
class Levers:
    """Optimisations of the compiled backends. Each can be switched off, to measure what it brings.

    compiled: torch.compile the attack step and the student. joint_student: call the student once for x + d and x - d
    (:mod:`ltat_fast.models.joint_batch`). compiled_teacher: torch.compile the teacher. combo_kernels: Inductor merges
    independent small kernels into one launch. compiled_refresh: torch.compile the update of the twin's weights.
    dependent_launch: a kernel starts while its predecessor finishes (programmatic dependent launch, Hopper). The last
    three are for CUDA.
    """

    compiled: bool = True
    joint_student: bool = True
    compiled_teacher: bool = True
    combo_kernels: bool = True
    compiled_refresh: bool = True
    dependent_launch: bool = True

    def inductor_options(self, device: torch.device) -> dict[str, bool]:
        """Return the options of torch.compile on ``device``, without those that this torch does not have."""
        if device.type != "cuda":
            return {}
        hopper = torch.cuda.get_device_capability(device) >= (9, 0)
        options = {
            "combo_kernels": self.combo_kernels,
            "benchmark_combo_kernel": False,
            "triton.enable_pdl": self.dependent_launch and hopper,
        }
        known = torch._inductor.list_options()
        return {name: value for name, value in options.items() if name in known}


ALL_LEVERS = Levers()
NO_LEVERS = Levers(**{field.name: False for field in fields(Levers)})


class TrainStep:
    """One step of ``method`` on ``model``.

    model: the trained network, on ``hardware.device``; the step leaves it in train mode.
    optimizer: made by :func:`make_optimizer`.
    attack: threat model and effort of the training attack.
    backend: one of :data:`BACKENDS`.
    train_model: what the loss calls instead of ``model``, for example its DistributedDataParallel wrapper.
    twin: network under attack; :func:`frozen_twin` of ``model`` if None.
    levers: optimisations of a compiled backend; eager uses none of them.
    modifiers: additions to the step.
    accumulate: number of micro-batches that a batch is split into, to save memory. It must divide the batch size.
    Raises ValueError if a joint student was not prepared by ``allow_joint_calls``.
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
        levers: Levers = ALL_LEVERS,
        modifiers: Modifiers = OFF,
        accumulate: int = 1,
    ):
        self.model, self.method, self.optimizer, self.attack = model, method, optimizer, attack
        self.modifiers, self.accumulate = modifiers, accumulate
        self.device, self.dtype, self.backend = hardware.device, hardware.dtype, backend
        self.frozen = twin or frozen_twin(model, hardware)
        self.generator = torch.Generator(device=self.device)
        self.lr = optimizer.param_groups[0]["lr"]
        self.progress = torch.zeros((), device=self.device)
        self.count = torch.zeros((), dtype=torch.float64, device=self.device)
        self.first_bad = torch.full((), -1.0, dtype=torch.float64, device=self.device)
        self.sums: dict[str, Tensor] = {}

        levers = levers if backend in ("step", "graph") else NO_LEVERS
        self.joint_student = levers.joint_student and not unknown_batch_norm(model)
        if self.joint_student:
            check_joint_calls(model)
        compile_ = functools.partial(torch.compile, dynamic=False, options=levers.inductor_options(self.device))
        # No function here may hold ``self``: a step that holds a compiled method of its own is a reference cycle, and
        # the garbage collector may then free its CUDA graph during a later capture.
        self._ascend = make_ascend(
            self.frozen,
            lambda point, logits, target: method.objective(point, logits, target),
            attack,
            compile_ if levers.compiled else None,
        )
        self._student: Callable[[Tensor], Tensor] = train_model or model
        self._no_sync = getattr(train_model, "no_sync", contextlib.nullcontext)  # of DistributedDataParallel
        if levers.compiled and not method.needs_double_backward:
            self._student = compile_(self._student)
        self._teacher = method.context.teacher
        if levers.compiled_teacher and self._teacher is not None:
            self._teacher = with_fallback(compile_(self._teacher), self._teacher)
        self._refresh = self.frozen.refresh
        if levers.compiled_refresh and self.device.type == "cuda":
            self._refresh = compile_(self._refresh)
        self._attacks = method.uses_attack
        # One graph for steps with the attack and, if the method has steps without it, one for those.
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}

    def __call__(self, x: Tensor, y: Tensor, *, lr: float, progress: float, seed: int, **strengths: float) -> None:
        """Train on one batch.

        x: float32 images ``(B, C, H, W)`` in [0, 1]. y: int64 labels ``(B,)``. progress: epoch / epochs, the epoch
        counted from 1. seed: seed of the start noise of the attack. strengths: arguments of :meth:`Modifiers.fill`.
        """
        self.lr.fill_(lr)
        self.progress.fill_(progress)
        self.modifiers.fill(**strengths)
        self._seed(seed)
        self._attacks = self.attacks_at(progress)
        if self.backend != "graph":
            self._run(x, y)
            return
        if not self._graphs:
            self._capture(x, y)
            self._seed(seed)
        self._x.copy_(x)
        self._y.copy_(y)
        self._graphs[self._attacks].replay()

    def _seed(self, seed: int) -> None:
        """Seed the noise of the attack and, for a network with dropout, torch's own generators, which it uses."""
        self.generator.manual_seed(seed)
        if getattr(self.model, "draws_in_training", False):
            torch.manual_seed(seed)

    def attacks_at(self, progress: float) -> bool:
        """Return whether a step at ``progress`` runs the attack."""
        return self.method.uses_attack and progress > self.method.attack_begin

    def _run(self, x: Tensor, y: Tensor) -> None:
        self._refresh()
        xs, ys = self.split(x), self.split(y)
        x_advs = self._perturb_each(x, y, xs) if self._attacks else xs
        self.model.train()
        batches = list(zip(xs, x_advs, ys, strict=True))
        with self._perturbed_weights(batches):
            self.optimizer.zero_grad(set_to_none=True)
            parts = self._backward(batches)
            self.optimizer.step()
        if self.modifiers.ema:
            self.modifiers.ema.update(self.model)
        self._record(parts)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the micro-batches of a batch, or of its labels. Raises ValueError if it does not split evenly."""
        return split(self.accumulate, x)

    def _perturbed_weights(self, batches: list[tuple[Tensor, ...]]) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the weights are updated: that of AWP, or an empty one."""
        if not self.modifiers.awp:
            return contextlib.nullcontext()
        return self.modifiers.awp.perturbed(self.model, lambda: self._backward(batches), self.method.state().values())

    def _backward(self, batches: list[tuple[Tensor, ...]]) -> Parts:
        """Add the gradient of the loss on all micro-batches to ``.grad``. Return "loss" and its parts, detached."""
        if len(batches) == 1 or not self.method.couples_images:
            return backward_each(self.loss, batches, self._no_sync)
        x, x_adv, y = (join(parts) for parts in zip(*batches, strict=True))
        student = OutputsFirst(self._student, self.accumulate, self._precision, self._no_sync)
        return backward_coupled(self.loss, (x, x_adv, y), student, self.model)

    def perturb(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the adversarial examples of a step, for the weights of the last :meth:`FrozenTwin.refresh`.

        The attack runs even if the present epoch of the method has none.
        """
        return join(self._perturb_each(x, y, self.split(x))) if self.method.uses_attack else x

    def _perturb_each(self, x: Tensor, y: Tensor, xs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the adversarial examples of each micro-batch in ``xs``, the parts of ``x``.

        The start noise is drawn for the whole batch, so it does not depend on their number.
        """
        budget = self.modifiers.budget
        scale = budget.scale(y, x.dtype) if budget else None
        starts = self.split(random_start(x, self.attack, self.generator, scale))
        scales = [None] * len(xs) if scale is None else self.split(scale)
        return tuple(map(self._ascend_from, starts, xs, self.split(y), scales))

    def _ascend_from(self, start: Tensor, x: Tensor, y: Tensor, scale: Tensor | None) -> Tensor:
        with torch.no_grad():
            target = self.method.target(self.frozen, x, y)
        return ascend_from(start, x, self._ascend, self.attack, (target,), scale)

    def loss(self, x: Tensor, x_adv: Tensor, y: Tensor, student: Model | None = None) -> tuple[Tensor, Parts]:
        """Return the method's loss in the training precision. The backward pass must run outside of autocast.

        student: called in place of that of the step, once for each batch of a joint call.
        """
        joint = joint_calls(self.joint_student and student is None)
        with self._precision(), joint, teacher_replaced(self.method.context, self._teacher):
            return self.method.loss(student or self._student, x, x_adv, y, self.progress)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """The context of a forward pass of the student."""
        reduced = self.dtype != torch.float32
        autocast = torch.autocast(self.device.type, self.dtype) if reduced else contextlib.nullcontext()
        # Fused attention has no second derivative.
        plain = sdpa_kernel(SDPBackend.MATH) if self.method.needs_double_backward else contextlib.nullcontext()
        with autocast, plain:
            yield

    def _record(self, parts: dict[str, Tensor]) -> None:
        finite = torch.isfinite(parts["loss"])
        # The number of the first bad step, so that it can be found later without waiting for the device here.
        self.first_bad.copy_(torch.where((self.first_bad < 0) & ~finite, self.count, self.first_bad))
        self.count += 1
        for name, value in parts.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(self.count)
            self.sums[name] += value

    def totals(self) -> dict[str, float]:
        """Return the sums over the steps since :meth:`restart`, averaged over all processes. Waits for the device.

        "steps" is the number of steps and "first_bad" the number of the first step whose loss was not finite, -1 if
        there was none. All processes must call this method.
        """
        sums = distributed.mean_over_processes(torch.stack([self.count, *self.sums.values()]))
        first_bad = distributed.max_over_processes(self.first_bad.clone())
        names = ["first_bad", "steps", *self.sums]
        return dict(zip(names, torch.cat([first_bad[None], sums]).tolist(), strict=True))

    def restart(self, totals: dict[str, float] | None = None) -> None:
        """Set the sums to zero at the start of an epoch, or to the ``totals`` of an interrupted epoch."""
        totals = dict(totals or {})
        self.count.fill_(totals.pop("steps", 0.0))
        self.first_bad.fill_(totals.pop("first_bad", -1.0))
        for name in [*self.sums, *totals]:
            # In place if the tensor exists: a captured step adds to this very tensor.
            self.sums.setdefault(name, torch.zeros_like(self.count)).fill_(totals.get(name, 0.0))

    def _capture(self, x: Tensor, y: Tensor) -> None:
        """Capture the step as CUDA graphs. The warm-up steps train, so the weights are restored afterwards."""
        self._x, self._y = x.clone(memory_format=torch.preserve_format), y.clone()
        restore, asked = self.snapshot(), self._attacks
        attacks = [self.attacks_at(1.0)]
        if attacks[0] and self.method.attack_begin > 0:
            attacks.append(False)
        pool = None
        for self._attacks in attacks:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(WARM_UP_STEPS):
                        self._run(self._x, self._y)
            finally:  # wait for the side stream before anyone restores the weights
                torch.cuda.current_stream().wait_stream(stream)
            self.optimizer.zero_grad(set_to_none=True)
            graph = capture(lambda: self._run(self._x, self._y), self.generator, stream, pool)
            # A replay leaves nothing behind in the memory of its graph that a later replay needs.
            self._graphs[self._attacks], pool = graph, graph.pool()
        self._attacks = asked
        restore()

    def trial(self, x: Tensor, y: Tensor, seed: int = 0) -> tuple[Tensor, float]:
        """Return adversarial examples and loss of one step that changes nothing, to compare backends."""
        restore = self.snapshot()
        self.restart()
        try:
            self(x, y, lr=float(self.lr), progress=1.0, seed=seed)
            loss = self.totals()["loss"]
        finally:  # a backend may fail in the middle of a step; the run then continues with another backend
            restore()
        self.frozen.refresh()
        self.generator.manual_seed(seed)
        return self.perturb(x, y), loss

    def snapshot(self) -> Callable[[], None]:
        """Copy every tensor that a step changes. Return a function that restores them in place."""
        momenta = [buffer for state in self.optimizer.state.values() for buffer in state.values()]
        kept = trained_state(self.method, self.modifiers).values()
        tensors = [*self.model.parameters(), *self.model.buffers(), *momenta, *kept]
        tensors = [tensor.detach() for tensor in [*tensors, self.count, self.first_bad, *self.sums.values()]]
        saved = [(tensor, tensor.clone()) for tensor in tensors]
        sums, known_sums = self.sums, set(self.sums)

        def restore() -> None:
            for tensor, before in saved:
                tensor.copy_(before)
            for name in sums.keys() - known_sums:
                sums[name].zero_()

        return restore


@contextlib.contextmanager
def teacher_replaced(context: MethodContext, teacher: Model | None) -> Iterator[None]:
    """Replace the teacher of ``context``, for example by its compiled version, inside a ``with`` block."""
    own, context.teacher = context.teacher, teacher
    try:
        yield
    finally:
        context.teacher = own


def with_fallback(compiled: Model, eager: Model) -> Model:
    """Return a network that calls ``compiled`` or, after its first error, ``eager``: not every teacher compiles."""
    failed = False

    def call(x: Tensor) -> Tensor:
        nonlocal failed
        if not failed:
            try:
                return compiled(x)
            except Exception as error:
                failed = True
                log.say(f"WARNING: the teacher is not compiled: {type(error).__name__}: {str(error).splitlines()[0]}")
        return eager(x)

    return call
