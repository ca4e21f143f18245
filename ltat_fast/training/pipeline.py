"""The whole run in order: data, teacher, student, evaluation, table."""

import functools

import numpy as np
import torch
from torch import nn

from ltat_fast import config as configuration
from ltat_fast import seeding
from ltat_fast.attacks import AttackConfig
from ltat_fast.config import Config, ratio
from ltat_fast.data import DeviceLoader
from ltat_fast.errors import UserError
from ltat_fast.files import write_json
from ltat_fast.methods import METHODS, Method, MethodContext
from ltat_fast.runs import log, tables
from ltat_fast.runs.environment import describe_environment
from ltat_fast.runs.results import CheckpointResults, EvalFile
from ltat_fast.runs.splits import Splits, balanced_indices, counts_tensor, load_splits
from ltat_fast.runs.weights import new_model, weights_card
from ltat_fast.schedule import first_drop
from ltat_fast.training import distributed, teachers
from ltat_fast.training.device import Hardware, make_deterministic
from ltat_fast.training.evaluation import evaluate_model, evaluate_run
from ltat_fast.training.fit import Stage, fit
from ltat_fast.training.step import frozen_twin


def train(config: Config, method: Method, hardware: Hardware) -> None:
    """Train and evaluate ``config`` into its run folder, from wherever that folder says it is."""
    if config.deterministic:
        make_deterministic()
    elif hardware.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    run_dir = config.run_dir
    if method.differentiates_twice and distributed.current().size > 1:
        raise UserError(f"--method {method.name} as configured differentiates twice: it runs in one process alone")
    if config.teacher is not None:
        teachers.find(config.teacher, config.arch)  # before any long work
    with distributed.main_first():  # it decodes; the others read its cache
        data = load_splits(config, hardware.device)
    # What can be refused is, before anything is written: a refused start leaves no half-made run in the way.
    student = student_stage(config, method, data, hardware)
    teacher = teacher_or_stage(config, method.teacher, data, hardware) if method.teacher != "none" else None
    environment = describe_environment(hardware.device, hardware.dtype, data)
    if distributed.current().is_main:
        write_json(run_dir / "config.json", configuration.to_json(config, method))
        write_json(run_dir / "env.json", environment)
    log.say(f"{hardware.device.type}, {environment['precision']} ({hardware.why}); seed {config.seed}; run {run_dir}")
    log.say("ops: " + ", ".join(f"{op}: {backend}" for op, backend in environment["ops"].items()))

    if isinstance(teacher, Stage):
        teacher = train_teacher(config, teacher, data, hardware)
    if teacher is not None:
        teacher = frozen_twin(teacher, hardware)
    method.setup(MethodContext(class_counts=counts_tensor(data, hardware.device), teacher=teacher))
    fit(student, hardware)
    evaluate_run(config, data, hardware)
    if distributed.current().is_main:
        log.say(tables.render([run_dir]))


def teacher_or_stage(config: Config, kind: str, data: Splits, hardware: Hardware) -> nn.Module | Stage:
    """The teacher that was given, or the stage that trains one of this ``kind`` (:class:`Method` lists them)."""
    if config.teacher is not None:
        log.say(f"teacher: {config.teacher}")
        with distributed.main_first():  # it may download
            return teachers.load(config.teacher, config.arch, data, hardware)
    method = METHODS["natural" if kind == "natural" else "pgd-at"]()
    indices = balanced_indices(config, data) if kind == "balanced" else None
    return _stage(config, "teacher", method, data, hardware, indices)


def train_teacher(config: Config, stage: Stage, data: Splits, hardware: Hardware) -> nn.Module:
    """The teacher, trained from wherever its folder says it is, and its scores."""
    fit(stage, hardware)
    scores = stage.folder / "eval.json"
    if not scores.exists():
        log.say("teacher on the test set:")
        result = evaluate_model(config, data, data.test, stage.model, ["clean", "pgd20"], log.say)
        if distributed.current().is_main:
            EvalFile({"last": CheckpointResults(result)}).save(scores)
    distributed.wait()
    return stage.model


def student_stage(config: Config, method: Method, data: Splits, hardware: Hardware) -> Stage:
    stage = _stage(config, "student", method, data, hardware)
    name = "test" if config.select_on == "test" else "heldout"

    def scores(model: nn.Module) -> dict[str, float]:
        result = evaluate_model(config, data, data.select, model, ["clean", "pgd20"])
        flat = {"clean": result["clean"].all, "pgd20": result["pgd20"].all}
        flat |= {"tail_clean": result["clean"].percent("tail"), "tail_pgd20": result["pgd20"].percent("tail")}
        return {f"{name}_{key}": value for key, value in flat.items() if value is not None}

    dropped = first_drop(config.lr_schedule, config.epochs)
    stage.evaluate, stage.select_by = scores, f"{name}_pgd20"
    stage.evaluate_when = lambda epoch: epoch >= dropped or (epoch + 1) % config.eval_every == 0
    return stage


def _stage(
    config: Config, name: str, method: Method, data: Splits, hardware: Hardware, indices: np.ndarray | None = None
) -> Stage:
    """The teacher's or the student's stage, as ``config`` has it."""
    is_teacher = name == "teacher"
    folder = config.run_dir / "teacher" if is_teacher else config.run_dir
    loader = DeviceLoader(
        data.train.images,
        data.train.labels,
        batch_size=config.teacher_batch_size if is_teacher else config.batch_size,
        seed=seeding.stream_seed(config.seed, name, "data"),
        pad=data.pad,
        flip=data.flip,
        augment=config.augment,
        device=hardware.device,
        rank=distributed.current().rank,
        world_size=distributed.current().size,
        channels_last=True,
        indices=indices,
    )
    # Seeded apart: teacher and student do not start from the same weights.
    model = new_model(config.arch, data, hardware.device, seeding.stream_seed(config.seed, name, "weights"), method)
    return Stage(
        name=name,
        folder=folder,
        model=model,
        arch=config.arch,
        method=method,
        loader=loader,
        attack=AttackConfig(ratio(config.eps), ratio(config.step_size), config.attack_steps, method.noise),
        epochs=config.teacher_epochs if is_teacher else config.epochs,
        lr=config.lr,
        lr_schedule=config.lr_schedule,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        seed=config.seed,
        card=functools.partial(weights_card, config, data, method),
        backend=config.compile,
        attack_fp32=config.attack_precision == "fp32" or (config.attack_precision == "auto" and method.flat_start),
        max_steps=config.max_steps,
        save_minutes=config.save_minutes,
        on_nan=config.on_nan,
    )
