"""Command line of the evaluation: attack a finished run or any network, keep the results and print their table.

    python -m ltat_fast.evaluate RUN [--checkpoint best] [--attacks clean,fgsm,pgd20,cw20,autoattack]
    python -m ltat_fast.evaluate timm:NAME@FILE --dataset cifar10-lt [--eps 2/255,4/255,8/255] [--out FILE]

The work is in ``ltat_fast/training/evaluation.py``; docs/evaluation.md describes attacks, checks and the file. Exit
status: 0 done; 2 a flag, a path or the data is wrong, or out of memory; 75 interrupted, finished attacks are kept.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ltat_fast import cli
from ltat_fast import config as configuration
from ltat_fast.attacks.by_name import CHOICES, parse_attacks
from ltat_fast.config import Config
from ltat_fast.data import DATASETS
from ltat_fast.errors import EXIT_INTERRUPTED, UserError, exit_on_user_error
from ltat_fast.files import refuse_read_only
from ltat_fast.methods import METHODS
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import log, tables
from ltat_fast.runs.results import EvalFile
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.threats import Threat, parse_threats
from ltat_fast.runs.weights import weights_file
from ltat_fast.signals import Interrupted, leave, stop_at_once
from ltat_fast.training import device, targets
from ltat_fast.training.evaluation import evaluate_checkpoints


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run or any network. The results of a run are written to its eval.json, each when its attack ends, so
    that an interrupted evaluation can resume."""

    target: tyro.conf.Positional[str]
    """run folder; or a network: an export folder, a .safetensors file, timm:NAME[@FILE], torchvision:NAME[@FILE] or
    module:PACKAGE.MODULE:NAME"""
    checkpoint: Literal["best", "last", "both"] = "both"
    """weights of a run to evaluate"""
    attacks: Annotated[str, tyro.conf.arg(help=f"attacks to run, comma-separated: {CHOICES}")] = (
        "clean,pgd20,autoattack"
    )
    eps: str | None = None
    """radius of the ball, or several, comma-separated: 2/255,4/255,8/255; that of the run or of the dataset if not
    given"""
    norm: Literal["linf", "l2"] = "linf"
    """norm of the ball; l2 needs --eps"""
    limit_eval: int | None = None
    """use only this many test images, spread evenly over the classes"""
    limit_autoattack: int | Literal["run", "none"] = "run"
    """use at most this many images for AutoAttack; run: the limit in the settings of the run; none: no such limit"""
    data_dir: Path | None = None
    """folder of the images of --dataset, or of the run if they were moved since"""
    dataset: str | None = None
    """dataset whose test images a network is evaluated on; a run has its own"""
    image_size: int | None = None
    """resize and centre-crop the images of a folder or list of --dataset to this height and width in pixels"""
    imbalance_ratio: float | None = None
    """imbalance ratio of --dataset, which decides the classes of head and tail; that of its preset if not given"""
    arch: str | None = None
    """network of a .safetensors file that does not name its own"""
    out: Path | None = None
    """file for the results of a network, in the format of eval.json; its results are not measured again"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to evaluate on; auto: cuda if a GPU is present"""
    batch_size: int = 256
    """images per batch"""
    again: bool = False
    """run attacks even if their results are already in the file"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    arguments = cli.parse(Arguments, "python -m ltat_fast.evaluate", argv)
    attacks = parse_attacks(arguments.attacks)
    if arguments.norm == "l2" and arguments.eps is None:
        raise UserError("--norm l2 needs a radius in this norm: give --eps, for example --eps 0.5")
    threats = parse_threats(arguments.eps, arguments.norm) if arguments.eps else []
    evaluate = _evaluate_network if targets.is_target(arguments.target) else _evaluate_run
    try:
        with stop_at_once(), explained("evaluate on a device with more free memory (--device)"):
            log.say(evaluate(arguments, attacks, threats))
    except Interrupted as error:
        flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--again"]
        log.say(f"{error}; resume with: python -m ltat_fast.evaluate {shlex.join(flags)}")
        return EXIT_INTERRUPTED
    return 0


def _evaluate_run(arguments: Arguments, attacks: list[str], threats: list[Threat]) -> str:
    """Evaluate a run, and return its table."""
    of_networks = ("dataset", "image_size", "imbalance_ratio", "arch", "out")
    run = Path(arguments.target)
    config, method = configuration.load(run)
    if given := [name for name in of_networks if getattr(arguments, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for a network, and {run} is a run, which has its own")
    config = dataclasses.replace(config, out=run, data_dir=arguments.data_dir or config.data_dir)
    config = _limited(config, arguments)
    configuration.validate(config, method)
    which = ["best", "last"] if arguments.checkpoint == "both" else [arguments.checkpoint]
    for name in which:
        weights_file(run, name)
    evaluated, own = EvalFile.load_or_empty(run / "eval.json"), Threat(config.eps)
    asked = [a if a == "clean" or t.is_like(own) else a + t.suffix for a in attacks for t in threats or [own]]
    if arguments.again or not all(evaluated.result(name, result) for name in which for result in asked):
        refuse_read_only(run)  # checked early; whether stored results fit the test set is known only later
    hardware = device.choose(arguments.device, "fp32")
    data = load_splits(config, hardware.device)
    evaluate_checkpoints(config, data, hardware, which, attacks, arguments.again, threats)
    return tables.render([run])


def _evaluate_network(arguments: Arguments, attacks: list[str], threats: list[Threat]) -> str:
    """Evaluate a network that is not a run, and return its table."""
    name, out = arguments.target, arguments.out
    if arguments.dataset is None:
        raise UserError(f"{name} is a network and has no test images of its own: give --dataset")
    configuration.choose("dataset", arguments.dataset, DATASETS)
    preset = dataclasses.replace(Config(dataset=arguments.dataset), **configuration.PRESETS[arguments.dataset])
    asked = {"imbalance_ratio": arguments.imbalance_ratio, "image_size": arguments.image_size}
    asked |= {"data_dir": arguments.data_dir, "store_size": None if arguments.image_size else preset.store_size}
    asked["eps"] = threats[0].eps if threats and threats[0].norm == "linf" else preset.eps
    config = dataclasses.replace(preset, **{key: value for key, value in asked.items() if value is not None})
    config = dataclasses.replace(_limited(config, arguments), arch="smallresnet", method="natural")
    configuration.validate(config, METHODS["natural"]())
    targets.find(name, arguments.arch)  # reports a wrong name before any image is read
    if out is not None:
        EvalFile.load_or_empty(out)
        refuse_read_only(out.parent)
    hardware = device.choose(arguments.device, "fp32")
    data = load_splits(config, hardware.device)
    options = {"threats": threats, "out": out, "again": arguments.again}
    results = targets.evaluate_target(name, arguments.arch, config, data, hardware, attacks, **options)
    return tables.of_network(f"{name}, {config.dataset}", config.eps, results.results)


def _limited(config: Config, arguments: Arguments) -> Config:
    limits = {"run": config.limit_autoattack, "none": None}
    return dataclasses.replace(
        config,
        limit_eval=arguments.limit_eval,
        limit_autoattack=limits.get(arguments.limit_autoattack, arguments.limit_autoattack),
        eval_batch_size=arguments.batch_size,
    )


if __name__ == "__main__":
    leave(main())
