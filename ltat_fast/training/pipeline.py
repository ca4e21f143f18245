"""The whole run in order: data, teacher, student, evaluation, table."""

import functools

import numpy as np
import torch
from torch import nn

from ltat_fast import config as configuration
from ltat_fast import seeding
from ltat_fast.attacks import AttackConfig
from ltat_fast.attacks.by_name import AUTOATTACK, parse_attacks
from ltat_fast.config import Config, ratio
from ltat_fast.data import DeviceLoader
from ltat_fast.errors import UserError
from ltat_fast.files import write_json
from ltat_fast.methods import METHODS, Method, MethodContext
from ltat_fast.runs import log, tables
from ltat_fast.runs.environment import describe_environment
from ltat_fast.runs.scores import Scores, fingerprint
from ltat_fast.runs.splits import DeviceImages, Splits, balanced_indices, counts_tensor, load_splits
from ltat_fast.runs.weights import load_model, new_model, weights_card, weights_digest, weights_file
from ltat_fast.schedule import first_drop
from ltat_fast.training import distributed, teachers
from ltat_fast.training.device import Hardware, make_deterministic
from ltat_fast.training.evaluation import check, evaluate
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
    final_evaluation(config, data, hardware)
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
        result = _evaluate(config, data, data.test, stage.model, ["clean", "pgd20"], log.say)
        if distributed.current().is_main:
            write_json(scores, {"last": result})
    distributed.wait()
    return stage.model


def student_stage(config: Config, method: Method, data: Splits, hardware: Hardware) -> Stage:
    stage = _stage(config, "student", method, data, hardware)
    name = "test" if config.select_on == "test" else "heldout"

    def scores(model: nn.Module) -> dict[str, float]:
        result = _evaluate(config, data, data.select, model, ["clean", "pgd20"])
        flat = {"clean": result["clean"]["all"], "pgd20": result["pgd20"]["all"]}
        flat |= {"tail_clean": result["clean"]["tail"], "tail_pgd20": result["pgd20"]["tail"]}
        return {f"{name}_{key}": value for key, value in flat.items() if value is not None}

    dropped = first_drop(config.lr_schedule, config.epochs)
    stage.evaluate, stage.select_by = scores, f"{name}_pgd20"
    stage.evaluate_when = lambda epoch: epoch >= dropped or (epoch + 1) % config.eval_every == 0
    return stage


def final_evaluation(config: Config, data: Splits, hardware: Hardware) -> None:
    """RUN/eval.json: the attacks of ``config`` on the best and the last weights. What is already there is kept."""
    evaluate_checkpoints(config, data, hardware, ["best", "last"], parse_attacks(config.eval_attacks))


def evaluate_checkpoints(
    config: Config, data: Splits, hardware: Hardware, checkpoints: list[str], attacks: list[str], again: bool = False
) -> None:
    """Evaluate ``checkpoints`` (of "best" and "last") and merge the results into RUN/eval.json, attack by attack.

    An attack whose result is there for the same weights, eps, test set and at least as many images is not run again,
    unless ``again``; "best" and "last" that are the same weights are attacked once. Before AutoAttack come the checks
    of :mod:`ltat_fast.attacks.checks`.
    """
    by_weights: dict[str, list[str]] = {}
    for which in checkpoints:
        by_weights.setdefault(weights_digest(weights_file(config.run_dir, which)), []).append(which)
    file, test_set = config.run_dir / "eval.json", fingerprint(data.test)
    for weights, names in by_weights.items():
        identity = {"weights": weights, "eps": config.eps, "test_set": test_set}
        scores = Scores(file, identity, names, data.test, data.groups, data.num_classes)
        _evaluate_weights(config, data, hardware, scores, attacks, again)


def _evaluate_weights(
    config: Config, data: Splits, hardware: Hardware, scores: Scores, attacks: list[str], again: bool
) -> None:
    """:func:`evaluate_checkpoints` for one set of weights."""

    @functools.cache
    def model() -> nn.Module:
        log.say(f"{' and '.join(scores.checkpoints)}, on the test set:")
        file = weights_file(config.run_dir, scores.checkpoints[0])
        return load_model(file, hardware.device, config.arch, data)

    def missing(known: dict | list | None) -> bool:
        """Whether to measure; all processes must go the same way, and a file may change while they read it."""
        return distributed.any_process(again or known is None, hardware.device)

    is_main = distributed.current().is_main
    first = next((attack for attack in attacks if attack in AUTOATTACK), None)
    for attack in attacks:
        if attack == first:
            checks = scores.known_checks()
            if missing(checks):
                checks = check(model(), data.test.images, data.test.labels, ratio(config.eps), log.say)
            if is_main:
                scores.add_checks(checks)
        images = min(limit for limit in (len(data.test), config.limit_eval, _limits(config).get(attack)) if limit)
        result = scores.known(attack, images)
        if missing(result):
            result = _evaluate(config, data, data.test, model(), [attack], log.say)[attack]
        if is_main:
            scores.add(attack, result)
    distributed.wait()  # the next call reads what this one wrote


def _limits(config: Config) -> dict[str, int | None]:
    return {"default": config.limit_eval} | dict.fromkeys(AUTOATTACK, config.limit_autoattack)


def _evaluate(config: Config, data: Splits, images: DeviceImages, model, attacks, say=lambda text: None) -> dict:
    return evaluate(
        model,
        images.images,
        images.labels,
        attacks,
        data.groups,
        data.num_classes,
        ratio(config.eps),
        batch_size=config.eval_batch_size,
        limits=_limits(config),
        say=say,
    )


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
