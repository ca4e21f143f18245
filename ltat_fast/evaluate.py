"""Evaluate: a finished run under the attacks of your choice, merged into RUN/eval.json (docs/evaluation.md).

    python -m ltat_fast.evaluate RUN [--checkpoint best] [--attacks clean,fgsm,pgd20,cw20,autoattack]

Exit status: 0 done; 2 a flag, a path or the data is at fault; 75 interrupted, what is finished is kept.
"""

import dataclasses
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ltat_fast import config as configuration
from ltat_fast.attacks.by_name import CHOICES, parse_attacks
from ltat_fast.errors import exit_on_user_error
from ltat_fast.files import refuse_read_only
from ltat_fast.runs import log, tables
from ltat_fast.runs.results import EvalFile
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import weights_file
from ltat_fast.train import EXIT_INTERRUPTED
from ltat_fast.training import device
from ltat_fast.training.evaluation import evaluate_checkpoints
from ltat_fast.training.signals import Interrupted, leave, stop_at_once


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run; results go into its eval.json, attack by attack, so an interrupted evaluation goes on."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    checkpoint: Literal["best", "last", "both"] = "both"
    """which weights"""
    attacks: Annotated[str, tyro.conf.arg(help=f"comma-separated: {CHOICES}")] = "clean,pgd20,autoattack"
    limit_eval: int | None = None
    """use this many test images only, spread evenly over the classes"""
    limit_autoattack: int | Literal["run", "none"] = "run"
    """at most this many for AutoAttack; run: as many as the run itself was evaluated on"""
    data_dir: Path | None = None
    """where the images are now, if not where the run found them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    batch_size: int = 256
    """images at a time"""
    again: bool = False
    """run attacks whose results are already there once more"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.evaluate", args=argv)
    attacks = parse_attacks(arguments.attacks)
    config, method = configuration.load(arguments.run)
    limits = {"run": config.limit_autoattack, "none": None}
    config = dataclasses.replace(
        config,
        out=arguments.run,
        data_dir=arguments.data_dir or config.data_dir,
        limit_eval=arguments.limit_eval,
        limit_autoattack=limits.get(arguments.limit_autoattack, arguments.limit_autoattack),
        eval_batch_size=arguments.batch_size,
    )
    configuration.validate(config, method)
    which = ["best", "last"] if arguments.checkpoint == "both" else [arguments.checkpoint]
    for name in which:
        weights_file(arguments.run, name)
    if arguments.again or not set(attacks) <= attacks_in(arguments.run / "eval.json", which):
        refuse_read_only(arguments.run)  # of the rest the images decide, when they are loaded
    hardware = device.choose(arguments.device, "fp32")
    try:
        with stop_at_once():
            data = load_splits(config, hardware.device)
            evaluate_checkpoints(config, data, hardware, which, attacks, arguments.again)
    except Interrupted as error:
        flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--again"]
        log.say(f"{error}; go on with: python -m ltat_fast.evaluate {shlex.join(flags)}")
        return EXIT_INTERRUPTED
    log.say(tables.render([arguments.run]))
    return 0


def attacks_in(file: Path, checkpoints: list[str]) -> set[str]:
    """The attacks that eval.json has results of at all ``checkpoints``, be they of these weights and images or not."""
    evaluated = EvalFile.load_or_empty(file)
    return set.intersection(*(set(evaluated.of(which).results) for which in checkpoints))


if __name__ == "__main__":
    leave(main())
