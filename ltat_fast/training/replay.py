"""Repeat a training step whose loss or weights were not finite, and find the first tensor that was not finite."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ltat_fast import config as configuration
from ltat_fast.config import Config
from ltat_fast.errors import UserError
from ltat_fast.methods import Method
from ltat_fast.methods.base import Model
from ltat_fast.runs import checkpoint, log, schema
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import load_model, read_weights, weights_file
from ltat_fast.training import device as devices
from ltat_fast.training import fit, pipeline
from ltat_fast.training.device import Hardware
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import TrainStep, make_optimizer, trained_state

Watch = Callable[[str, object], None]


def replay(dump: Path, data_dir: Path | None = None, device: str | None = None) -> list[str]:
    """Repeat the step in ``dump`` and return descriptions of what was not finite, in the order of computation.

    data_dir, device: used instead of those of the run, if given. Raises UserError if ``dump`` is not a dump of a
    training step.
    """
    tensors, card = read_weights(dump)
    if not {"found", "arguments", "stage"} <= card.keys():
        raise UserError(f"{dump} is not a dump of a training step")
    schema.check(dump, card, schema.DUMP, needed=tuple(schema.DUMP))
    if not {"images", "labels"} <= tensors.keys():
        raise UserError(f"{dump} is not a dump of a training step: it has no images")
    folder = dump.resolve().parent.parent
    run_dir = folder.parent if card["stage"] == "teacher" else folder
    config, method = configuration.load(run_dir)
    data_dir, device = data_dir or config.data_dir, device or config.device
    config = dataclasses.replace(config, out=run_dir, data_dir=data_dir, device=device)
    hardware = devices.choose(config.device, config.precision)
    stage = _stage(config, method, hardware, card["stage"])
    optimizer = make_optimizer(stage.model, config.lr, config.momentum, config.weight_decay)
    checkpoint.restore(tensors, dump, stage.model, optimizer, config.arch, stage.state)
    step = fit.train_step(stage, optimizer, hardware)
    x = tensors["images"].to(hardware.device, memory_format=torch.channels_last)

    log.say(
        f"{stage.name}, epoch {card['epoch'] + 1}, step {card['step'] + 1}: the run found the {card['found']} not "
        f"finite with backend {card['backend']}"
    )
    if card["processes"] > 1:
        log.say(f"this is the share of one of {card['processes']} processes: here batch norm sees only these images")
    return examine(step, x, tensors["labels"].to(hardware.device), card["arguments"])


def _stage(config: Config, method: Method, hardware: Hardware, name: str) -> Stage:
    """Return the stage "teacher" or "student" of the run, ready to train."""
    splits = load_splits(config, hardware.device)
    teacher = None
    if method.teacher != "none":
        teacher = pipeline.teacher_or_stage(config, method.teacher, splits, hardware)
    if name == "teacher":
        return teacher
    if isinstance(teacher, Stage):
        teacher = load_model(weights_file(teacher.folder), hardware.device, config.arch, splits)
    stage = pipeline.student_stage(config, method, splits, hardware)
    pipeline.setup_method(method, splits, teacher, hardware, config.label_smoothing)
    return stage


def examine(step: TrainStep, x: Tensor, y: Tensor, arguments: dict[str, float]) -> list[str]:
    """Take ``step`` on a batch and return descriptions of all tensors that were not finite, in order of computation.

    x: float32 images ``(B, C, H, W)``. y: int64 labels ``(B,)``. arguments: those of the step, made by
    :meth:`Stage.step_arguments`.
    """
    findings: list[str] = []

    def watch(what: str, value: object) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                watch(what, part)
        elif isinstance(value, Tensor) and (bad := (~value.isfinite()).sum().item()):
            findings.append(f"{what} ({bad} of {value.numel()} values)")

    model, method = step.model, step.method
    state = trained_state(method, step.modifiers)
    for name, tensor in checkpoint.training_tensors(model, step.optimizer, state).items():
        watch(f"{name}, before the step", tensor)
    watch("the images", x)
    with _watched(step, watch):
        step.restart()
        step(x, y, **arguments)
    for name, tensor in model.state_dict().items():
        watch(f"{name}, after the step", tensor)
    return findings


@contextlib.contextmanager
def _watched(step: TrainStep, watch: Watch) -> Iterator[None]:
    """Call ``watch(name, tensor)`` for every intermediate result of ``step``, inside a ``with`` block."""
    method, original_loss = step.method, step.loss

    def objective(point: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        if point.requires_grad:
            point.register_hook(lambda grad: watch("attack: gradient of the images", grad))
        value = type(method).objective(method, point, logits, target)
        watch("attack: objective", value)
        return value

    def loss(x: Tensor, x_adv: Tensor, y: Tensor, *student: Model) -> tuple[Tensor, dict[str, Tensor]]:
        watch("attack: adversarial examples", x_adv)
        value, parts = original_loss(x, x_adv, y, *student)
        for name, part in parts.items():
            watch(f"loss: part {name}", part)
        watch("loss", value)
        return value, parts

    hooks = [*_hooks(step.frozen, "attack: network", watch), *_hooks(step.model, "student", watch)]
    if teacher := getattr(getattr(method, "context", None), "teacher", None):
        hooks += _hooks(teacher, "teacher", watch)
    for name, parameter in step.model.named_parameters():
        hooks.append(parameter.register_hook(lambda grad, name=name: watch(f"gradient of {name}", grad)))
    method.objective, step.loss = objective, loss
    try:
        yield
    finally:
        del method.objective, step.loss
        for hook in hooks:
            hook.remove()


def _hooks(network: nn.Module, role: str, watch: Watch) -> list:
    """Register ``watch`` on the output of every leaf module of ``network`` and on its logits. Return the handles.

    role: first part of each reported name, for example "student".
    """

    def hook(what: str) -> Callable:
        return lambda module, inputs, output: watch(what, output)

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(hook(f"{role}: output of {name}")) for name, module in leaves]
    return [*handles, network.register_forward_hook(hook(f"{role}: logits"))]
