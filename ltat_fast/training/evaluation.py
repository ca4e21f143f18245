"""Measure networks and the checkpoints of a run under several attacks, and keep the results in RUN/eval.json.

The attacks themselves are in :mod:`ltat_fast.attacks.by_name`, the content of the file in
:mod:`ltat_fast.runs.results`.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ltat_fast.attacks.autoattack import PARTS
from ltat_fast.attacks.by_name import AUTOATTACK, OWN_PARTS, correct_under, parse_attacks
from ltat_fast.attacks.checks import Check, run_checks
from ltat_fast.config import Config
from ltat_fast.data import HostImages
from ltat_fast.errors import UserError
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.precision import without_tf32
from ltat_fast.out_of_memory import explained
from ltat_fast.pixels import to_unit
from ltat_fast.runs import log
from ltat_fast.runs.metrics import spread
from ltat_fast.runs.results import EvalFile, Identity, Result
from ltat_fast.runs.scores import Scores, fingerprint
from ltat_fast.runs.splits import DeviceImages, Splits
from ltat_fast.runs.unfinished import Unfinished
from ltat_fast.runs.weights import load_model, weights_digest, weights_file
from ltat_fast.training import distributed
from ltat_fast.training.device import Hardware, without_cudnn_search
from ltat_fast.training.step import frozen_twin


def evaluate(
    model: nn.Module,
    images: Tensor | HostImages,
    labels: Tensor,
    attacks: Sequence[str],
    groups: dict[str, list[int]],
    num_classes: int,
    eps: float,
    *,
    batch_size: int,
    limits: dict[str, int | None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    strict: bool = True,
    unfinished: Unfinished | None = None,
) -> dict[str, Result]:
    """Return the result of each attack on ``model`` in eval mode.

    model: a network, which is evaluated in float32, or a frozen twin, which is evaluated as it is. strict: forbid TF32.
    images: uint8 ``(N, C, H, W)`` and labels: int64 ``(N,)``, for the model's device. limits: the largest number of
    images to use, by attack; the limit "default" holds for all attacks. Several processes share the batches; each of
    them returns the whole result. unfinished: where an interrupted AutoAttack is kept.
    """
    frozen = model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=True)
    limits = limits or {}
    world = distributed.current()
    results = {}
    classes = labels.cpu().numpy()
    every = spread(classes, limits.get("default"))
    for name in attacks:
        chosen = every[spread(classes[every], limits.get(name))]
        places = torch.from_numpy(chosen)
        y = labels[places.to(labels.device)]
        x = images.select(chosen) if isinstance(images, HostImages) else images[places.to(images.device)]
        part = (world.rank, world.size)
        options = {"batch_size": batch_size, "indices": places, "part": part}
        if name in OWN_PARTS:
            options["store"] = unfinished and unfinished.of(name, places, part, batch_size)
        own_images = sum(len(batch) for batch in places.split(batch_size)[world.rank :: world.size])
        exact = without_tf32() if strict else contextlib.nullcontext()
        with log.progress(name, own_images, "images", images_per_unit=1) as bar, without_cudnn_search(), exact:
            own_part = correct_under(name, frozen, x, y, eps, **options, advance=bar.advance)
        correct = torch.cat(distributed.gather_in_turn(list(own_part.split(batch_size))))
        used = np.isin(np.arange(len(images)), chosen) if len(chosen) < len(images) else None
        results[name] = Result.from_correct(correct, y, groups, num_classes, used)
        say(f"  {name}: {results[name].all:.2f} % of {len(y)} images")
    return results


def check(
    model: nn.Module, images: Tensor | HostImages, labels: Tensor, eps: float, say: Callable[[str], None]
) -> list[Check]:
    """Run the checks of :mod:`ltat_fast.attacks.checks` on 64 of the images and print the failures.

    The checks use the network that :func:`evaluate` attacks. The arguments are those of :func:`evaluate`.
    """
    index = torch.from_numpy(spread(labels.cpu().numpy(), 64)).to(labels.device)
    with without_cudnn_search(), without_tf32():
        checks = run_checks(FrozenTwin(model, fold_bn=True), to_unit(images[index]), labels[index], eps)
    failed = [check for check in checks if not check.passed]
    warning = ": the accuracy under attack may be too high" if failed else ""
    say(f"  checks: {len(checks) - len(failed)} of {len(checks)} passed{warning}")
    for check in failed:
        say(f"  FLAG {check.name}: {check.detail}")
    return checks


def evaluate_run(config: Config, splits: Splits, hardware: Hardware) -> None:
    """Evaluate the best and the last checkpoint under the attacks of ``config``, except those in RUN/eval.json."""
    evaluate_checkpoints(config, splits, hardware, ["best", "last"], parse_attacks(config.eval_attacks))


def evaluate_checkpoints(
    config: Config, splits: Splits, hardware: Hardware, checkpoints: list[str], attacks: list[str], again: bool = False
) -> None:
    """Evaluate ``checkpoints`` ("best", "last" or both) and add the result of each attack to RUN/eval.json.

    An attack is skipped if the file has its result for the same weights, eps and test set on at least as many images;
    ``again`` runs it anyway. If "best" and "last" are the same weights, they are attacked once. The checks of
    :mod:`ltat_fast.attacks.checks` run before AutoAttack.
    """
    by_weights: dict[str, list[str]] = {}
    for which in checkpoints:  # each file is read here, so a damaged one is refused even if another has its results
        by_weights.setdefault(weights_digest(weights_file(config.run_dir, which)), []).append(which)
    file, test_set = config.run_dir / "eval.json", fingerprint(splits.test)
    if EvalFile.load_or_empty(file).test_sets - {test_set}:
        raise UserError(f"{file} has results on other test images: restore these, or move the file away to keep both")
    for weights, names in by_weights.items():
        identity = Identity(weights, config.eps, test_set)
        scores = Scores(file, identity, names, splits.test, splits.groups, splits.num_classes)
        with _explained(config):
            _evaluate_weights(config, splits, hardware, scores, attacks, again)


def _evaluate_weights(
    config: Config, splits: Splits, hardware: Hardware, scores: Scores, attacks: list[str], again: bool
) -> None:
    """Do the work of :func:`evaluate_checkpoints` for one set of weights."""

    @functools.cache
    def model() -> nn.Module:
        log.say(f"{' and '.join(scores.checkpoints)}, on the test set:")
        file = weights_file(config.run_dir, scores.checkpoints[0])
        return load_model(file, hardware.device, config.arch, splits)

    def missing(known: Result | tuple | None) -> bool:
        """Return whether to measure. All processes must agree, but the file may change while they read it."""
        return distributed.any_process(again or known is None, hardware.device)

    is_main = distributed.current().is_main
    unfinished = Unfinished(scores.file.parent, scores.identity)
    first = next((attack for attack in attacks if attack in AUTOATTACK), None)
    for attack in attacks:
        if attack == first:
            checks = scores.known_checks()
            if missing(checks):
                checks = check(model(), splits.test.images, splits.test.labels, config.attack_config.eps, log.say)
            if is_main:
                scores.add_checks(checks)
        images = min(limit for limit in (len(splits.test), config.limit_eval, _limits(config).get(attack)) if limit)
        result = scores.known(attack, images)
        if missing(result):
            result = evaluate_model(config, splits, splits.test, model(), [attack], log.say, unfinished=unfinished)[
                attack
            ]
        if is_main:
            scores.add(attack, result)
        unfinished.remove(attack)
    distributed.wait()  # the next call reads what this one wrote


def _explained(config: Config) -> contextlib.AbstractContextManager[None]:
    """Return the context in which an evaluation that runs out of memory says so."""
    now = config.eval_batch_size
    advice = f"evaluate fewer than {now} images at a time (--eval-batch-size of train, --batch-size of evaluate)"
    return explained(f"{advice}; finished attacks are kept", f"--eval-batch-size {max(now // 2, 1)}")


def _limits(config: Config) -> dict[str, int | None]:
    return {"default": config.limit_eval} | dict.fromkeys([*AUTOATTACK, *PARTS], config.limit_autoattack)


def evaluate_model(
    config: Config,
    splits: Splits,
    images: DeviceImages,
    model: nn.Module,
    attacks: Sequence[str],
    say: Callable[[str], None] = lambda text: None,
    strict: bool = True,
    unfinished: Unfinished | None = None,
) -> dict[str, Result]:
    """Run :func:`evaluate` on ``images`` of ``splits`` with the eps, batch size and limits of ``config``."""
    with _explained(config):
        return evaluate(
            model,
            images.images,
            images.labels,
            attacks,
            splits.groups,
            splits.num_classes,
            config.attack_config.eps,
            batch_size=config.eval_batch_size,
            limits=_limits(config),
            say=say,
            strict=strict,
            unfinished=unfinished,
        )


def selection_twin(model: nn.Module, config: Config, hardware: Hardware) -> FrozenTwin:
    """Return the twin of ``model`` whose scores select the best epoch; refresh it before each evaluation.

    It computes in the precision of training and is compiled on a GPU. In float32 with cuDNN's NHWC convolutions, forty
    evaluations would take longer than all of the training of a ResNet-18. The final results use float32.
    """
    if hardware.device.type == "cpu" and hardware.dtype == torch.float32:
        return FrozenTwin(model, fold_bn=True)
    twin = frozen_twin(model, hardware)
    if hardware.device.type == "cuda" and config.compile != "none":
        twin.compile(dynamic=False)
    name = {torch.bfloat16: "bf16", torch.float32: "TF32"}[hardware.dtype]
    log.say(f"the best epoch is selected by scores in {name}; final results are in float32")
    return twin
