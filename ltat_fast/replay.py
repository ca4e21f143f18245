"""Replay the training step that gave a number which is not finite, and say where the first such number appears.

    python -m ltat_fast.replay RUN/nan/epoch-3-step-17.safetensors

The file holds the batch, the seed and everything the step starts from; the run around it, its data and its teacher are
read from where the run was. The step is taken operator by operator, whatever it was compiled to.

Exit status: 0 it happened again; 1 it did not; 2 the file, the run or the data is at fault.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from ltat_fast import config as configuration
from ltat_fast.config import Config
from ltat_fast.engine import checkpoint, device, fit, log, pipeline, run
from ltat_fast.engine.device import Hardware
from ltat_fast.engine.stage import Stage
from ltat_fast.engine.step import TrainStep, frozen_twin, make_optimizer
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.methods import Method, Setting

Watch = Callable[[str, object], None]
SHOWN = 8  # findings; a number that is not finite soon is in every tensor


@dataclass(frozen=True)
class Arguments:
    """Replay a training step that went wrong."""

    dump: tyro.conf.Positional[Path]
    """a file from the nan/ folder of a run or of its teacher"""
    data_dir: Path | None = None
    """where the images are now, if not where the run found them"""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """where to replay, if not where the run was"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.replay", args=argv)
    tensors, card = checkpoint.read(arguments.dump)
    if not {"found", "arguments", "stage"} <= card.keys():
        raise UserError(f"{arguments.dump} is not a step that a run has written down to be replayed")
    folder = arguments.dump.resolve().parent.parent
    run_dir = folder.parent if card["stage"] == "teacher" else folder
    config, method = configuration.load(run_dir)
    config = dataclasses.replace(
        config,
        out=run_dir,
        data_dir=arguments.data_dir or config.data_dir,
        device=arguments.device or config.device,
    )
    hardware = device.choose(config.device, config.precision)
    stage = _stage(config, method, hardware, card["stage"])
    optimizer = make_optimizer(stage.model, stage.lr, stage.momentum, stage.weight_decay)
    checkpoint.restore(tensors, arguments.dump, stage.model, optimizer, stage.arch, stage.method.state())
    step = fit.train_step(stage, optimizer, hardware)
    x = tensors["images"].to(hardware.device, memory_format=torch.channels_last)

    log.say(
        f"{stage.name}, epoch {card['epoch'] + 1}, step {card['step'] + 1}: the run found the {card['found']} not "
        f"finite with backend {card['backend']}"
    )
    if card["processes"] > 1:
        log.say(f"this is the share of one of {card['processes']} processes: batch norm sees only these images here")
    findings = examine(step, x, tensors["labels"].to(hardware.device), card["arguments"])
    for finding in findings[:SHOWN]:
        log.say(f"not finite: {finding}")
    if len(findings) > SHOWN:
        log.say(f"... and {len(findings) - SHOWN} more after these")
    log.say(f"first: {findings[0]}" if findings else "every number is finite here: it did not happen again")
    return 0 if findings else 1


def _stage(config: Config, method: Method, hardware: Hardware, name: str) -> Stage:
    """The stage of the run that the step belongs to, ready to train."""
    data = run.load_data(config, hardware.device)
    teacher = None
    if method.teacher != "none":
        teacher = pipeline.teacher_or_stage(config, method.teacher, data, hardware)
    if name == "teacher":
        return teacher
    if isinstance(teacher, Stage):
        teacher = run.load_model(run.weights_in(teacher.folder), hardware.device, config.arch, data)
    stage = pipeline.student_stage(config, method, data, hardware)
    twin = None if teacher is None else frozen_twin(teacher, hardware)
    method.setup(Setting(class_counts=run.counts_tensor(data, hardware.device), teacher=twin))
    return stage


def examine(step: TrainStep, x: Tensor, y: Tensor, arguments: dict[str, float]) -> list[str]:
    """Take ``step`` on the batch; everything in it that is not finite, in the order in which it was computed.

    arguments: learning rate, progress and seed, as :meth:`Stage.step_arguments` gives them.
    """
    findings: list[str] = []

    def watch(what: str, value: object) -> None:
        if isinstance(value, tuple | list):
            for part in value:
                watch(what, part)
        elif isinstance(value, Tensor) and (bad := (~value.isfinite()).sum().item()):
            findings.append(f"{what} ({bad} of {value.numel()} values)")

    model, method = step.model, step.method
    for name, tensor in checkpoint.training_tensors(model, step.optimizer, method.state()).items():
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
    """While open, what ``step`` computes on its way is shown to ``watch``."""
    method, original = step.method, step.loss

    def objective(point: Tensor, logits: Tensor, target: Tensor) -> Tensor:
        if point.requires_grad:
            point.register_hook(lambda grad: watch("attack: gradient of the images", grad))
        value = type(method).objective(method, point, logits, target)
        watch("attack: objective", value)
        return value

    def loss(x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        watch("attack: adversarial examples", x_adv)
        value, parts = original(x, x_adv, y)
        for name, part in parts.items():
            watch(f"loss: its part {name}", part)
        watch("loss", value)
        return value, parts

    hooks = [*_hooks(step.frozen, "attack: network", watch), *_hooks(step.model, "student", watch)]
    if teacher := getattr(getattr(method, "setting", None), "teacher", None):
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


def _hooks(network: nn.Module, whose: str, watch: Watch) -> list:
    """Show ``watch`` the output of every layer of ``network`` that has no layers of its own, and its logits."""

    def hook(what: str) -> Callable:
        return lambda module, inputs, output: watch(what, output)

    layers = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(hook(f"{whose}: output of {name}")) for name, module in layers]
    return [*hooks, network.register_forward_hook(hook(f"{whose}: logits"))]


if __name__ == "__main__":
    raise SystemExit(main())
