"""The whole run in order: data, teacher, student, evaluation, table."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ltat_fast import config as configuration
from ltat_fast import seeding
from ltat_fast.attacks.results import BALANCED
from ltat_fast.config import Config
from ltat_fast.data import DeviceLoader
from ltat_fast.errors import UserError
from ltat_fast.files import write_json
from ltat_fast.methods import METHODS, Method, MethodContext
from ltat_fast.methods.modifiers import OFF
from ltat_fast.models import libraries
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.libraries import is_foreign
from ltat_fast.models.sync_batch_norm import unknown_batch_norm
from ltat_fast.runs import checkpoint, log, tables
from ltat_fast.runs.environment import describe_environment, record_environment, refuse_other_data
from ltat_fast.runs.results import CheckpointResults, EvalFile
from ltat_fast.runs.splits import Splits, balanced_indices, counts_tensor, load_splits
from ltat_fast.runs.weights import new_model, read_weights, weights_card
from ltat_fast.schedule import first_drop
from ltat_fast.training import distributed, teachers
from ltat_fast.training.device import Hardware, make_deterministic
from ltat_fast.training.evaluation import evaluate_model, evaluate_run, selection_twin
from ltat_fast.training.fit import fit
from ltat_fast.training.stage import Selection, Stage, build_modifiers, state_file
from ltat_fast.training.step import frozen_twin
from ltat_fast.training.tune import choose_for_cpu


def train(config: Config, method: Method, hardware: Hardware) -> None:
    """Train and evaluate the run of ``config`` in its run folder; continue from the state in that folder."""
    if config.deterministic:
        make_deterministic()
    elif hardware.device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # every step has the same shapes
    run_dir = config.run_dir
    if method.needs_double_backward and distributed.current().size > 1:
        raise UserError(f"--method {method.name} with these options needs a double backward: use a single process")
    configuration.validate_batches(config, method, distributed.current().size)
    if config.teacher is not None:
        teachers.find(config.teacher, config.arch, config.activation)  # report a wrong --teacher before any long work
    if is_foreign(config.arch):
        libraries.find(config.arch)  # the same for a wrong --arch and --init
    if config.init not in ("none", "published") and not config.resume:
        read_weights(Path(config.init), foreign=True)
    with distributed.main_first():  # the main process decodes the images, the others read its cache
        splits = load_splits(config, hardware.device)
    config = dataclasses.replace(config, select_on=splits.selected_on)  # the run records what "auto" became
    # Build both stages before anything is written, so that an error until then leaves no incomplete run behind.
    student = student_stage(config, method, splits, hardware)
    teacher = teacher_or_stage(config, method.teacher, splits, hardware) if method.teacher != "none" else None
    hardware = choose_for_cpu(student, hardware)
    student.selection = selection_by_pgd20(student, splits, hardware)
    given = None if isinstance(teacher, Stage) else teacher
    environment = describe_environment(hardware.device, hardware.dtype, splits, given)
    refuse_other_data(run_dir / "env.json", environment)
    if distributed.current().is_main:
        write_json(run_dir / "config.json", configuration.to_json(config, method))
        record_environment(run_dir / "env.json", environment)
    log.say(f"{hardware.device.type}, {environment['precision']} ({hardware.why}); seed {config.seed}; run {run_dir}")
    if changed := configuration.changed_modifiers(dataclasses.asdict(config)):
        log.say("modifiers: " + ", ".join(f"{name} {value}" for name, value in changed.items()))
    log.say("ops: " + ", ".join(f"{op}: {backend}" for op, backend in environment["ops"].items()))

    if isinstance(teacher, Stage):
        teacher = train_teacher(teacher, splits, hardware)
    setup_method(method, splits, teacher, hardware, config.label_smoothing)
    fit(student, hardware)
    evaluate_run(config, splits, hardware)
    if distributed.current().is_main:
        log.say(tables.render([run_dir]))


def setup_method(
    method: Method, splits: Splits, teacher: nn.Module | None, hardware: Hardware, label_smoothing: float = 0.0
) -> None:
    """Give ``method`` the class counts of the training images, the frozen twin of its teacher and the smoothing."""
    twin = None if teacher is None else frozen_twin(teacher, hardware)
    method.setup(MethodContext(counts_tensor(splits, hardware.device), twin, label_smoothing))


def teacher_or_stage(config: Config, kind: str, splits: Splits, hardware: Hardware) -> nn.Module | Stage:
    """Return the teacher given by ``--teacher``, or the stage that trains one.

    kind: a value of the class attribute ``teacher`` of :class:`Method` other than "none".
    """
    if config.teacher is not None:
        log.say(f"teacher: {config.teacher}")
        with distributed.main_first():  # the main process may download it
            return teachers.load(config.teacher, config.arch, splits, hardware, config.activation)
    method = METHODS["natural" if kind == "natural" else "pgd-at"]()
    smoothing = config.label_smoothing if config.modify_teacher else 0.0
    setup_method(method, splits, None, hardware, smoothing)
    indices = balanced_indices(config, splits) if kind == "balanced" else None
    return _stage(config, "teacher", method, splits, hardware, indices)


def train_teacher(stage: Stage, splits: Splits, hardware: Hardware) -> nn.Module:
    """Train the teacher, or continue its training, and write its scores to RUN/teacher/eval.json."""
    fit(stage, hardware)
    scores = stage.folder / "eval.json"
    if not scores.exists():
        log.say("teacher on the test set:")
        result = evaluate_model(stage.config, splits, splits.test, stage.trained, ["clean", "pgd20"], log.say)
        if distributed.current().is_main:
            EvalFile({"last": CheckpointResults(result)}).save(scores)
    distributed.wait()
    return stage.trained


def student_stage(config: Config, method: Method, splits: Splits, hardware: Hardware) -> Stage:
    """Return the stage that trains the student, without a selection of its best epoch."""
    return _stage(config, "student", method, splits, hardware)


def selection_by_pgd20(stage: Stage, splits: Splits, hardware: Hardware) -> Selection:
    """Return the selection of the epoch with the highest PGD-20 accuracy, on the images of ``--select-on``."""
    config = stage.config
    name = splits.selected_on

    @functools.cache  # built at the first evaluation, when the batch norms of the model are final
    def twin() -> FrozenTwin:
        return selection_twin(stage.trained, config, hardware)

    def scores() -> dict[str, float]:
        twin().refresh()
        result = evaluate_model(config, splits, splits.select, twin(), ["clean", "pgd20"], strict=False)
        flat = {"clean": result["clean"].all, "pgd20": result["pgd20"].all}
        for group in ("tail", BALANCED):
            flat |= {f"{group}_{attack}": result[attack].percent(group) for attack in ("clean", "pgd20")}
        return {f"{name}_{key}": value for key, value in flat.items() if value is not None}

    dropped = first_drop(config.lr_schedule, config.epochs)
    return Selection(
        evaluate=scores,
        after=lambda epoch: epoch >= dropped or (epoch + 1) % config.eval_every == 0,
        by=f"{name}_pgd20",
    )


def _stage(
    config: Config, name: str, method: Method, splits: Splits, hardware: Hardware, indices: np.ndarray | None = None
) -> Stage:
    """Return the stage "teacher" or "student" over the training images ``indices`` (all of them if None)."""
    loader = DeviceLoader(
        splits.train.images,
        splits.train.labels,
        batch_size=config.teacher_batch_size if name == "teacher" else config.batch_size,
        seed=seeding.stream_seed(config.seed, name, "data"),
        pad=splits.pad,
        flip=splits.flip,
        augment=config.augment,
        crop=config.crop,
        size=splits.image_size[0] if config.crop == "resized" or config.store_size else None,
        device=hardware.device,
        rank=distributed.current().rank,
        world_size=distributed.current().size,
        channels_last=True,
        indices=indices,
    )
    # Teacher and student have different seeds, so that they do not start from the same weights.
    seed = seeding.stream_seed(config.seed, name, "weights")
    # A stage that has a state starts from that.
    init = "none" if checkpoint.has_state(state_file(config, name)) else config.init
    with distributed.main_first() if init == "published" else contextlib.nullcontext():  # the main process downloads it
        model = new_model(config.arch, splits, hardware.device, seed, method, config.activation, init)
    modified = name == "student" or config.modify_teacher
    card = functools.partial(weights_card, config, splits, method, modified=modified)
    own = OFF
    if modified:
        counts = torch.bincount(splits.train.labels.cpu()[loader.indices], minlength=splits.num_classes)
        own = build_modifiers(config, method, model, counts.to(hardware.device))
    _refuse_unusable(config.arch, model, perturbs_weights=own.awp is not None)
    return Stage(name, config, model, method, loader, card, modifiers=own)


def _refuse_unusable(arch: str, model: nn.Module, perturbs_weights: bool) -> None:
    """Raise UserError if ``model``, of other code, cannot be trained in several processes or with AWP as asked."""
    several = distributed.current().size > 1
    if several and (layer := unknown_batch_norm(model)):
        unknown = f"{arch} has a batch norm ({layer}) that cannot be synchronised between processes"
        raise UserError(f"{unknown}: use a single process, or a network with nn.BatchNorm2d or without batch norm")
    if (unused := getattr(model, "unused", None)) and (several or perturbs_weights):
        instead = "use a single process" if several else "use --awp 0"
        raise UserError(f"{arch} has a weight that gets no gradient ({unused}): {instead}, or remove the weight")
