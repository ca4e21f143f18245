"""Evaluate: a finished run under the attacks of your choice, merged into RUN/eval.json.

python -m ltat_fast.evaluate RUN [--checkpoint best] [--attacks clean,fgsm,pgd20,cw20,autoattack]
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import config as configuration
from ltat_fast.attacks.evaluation import parse_attacks
from ltat_fast.engine import device, log, pipeline, tables
from ltat_fast.engine import run as runs
from ltat_fast.errors import exit_on_user_error


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run; results go into its eval.json, attack by attack, so an interrupted evaluation goes on."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    checkpoint: Literal["best", "last", "both"] = "both"
    """which weights"""
    attacks: str = "clean,pgd20,autoattack"
    """comma-separated: clean, fgsm, pgd<steps>, cw<steps>, autoattack"""
    limit_eval: int | None = None
    """use this many test images only, spread evenly over the classes"""
    data_dir: Path | None = None
    """where the images are now, if not where the run found them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one"""
    batch_size: int = 256
    """images at a time"""
    again: bool = False
    """run attacks whose results are already there once more"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.evaluate", args=argv)
    attacks = parse_attacks(arguments.attacks)
    config, method = configuration.load(arguments.run)
    config = dataclasses.replace(
        config,
        out=arguments.run,
        data_dir=arguments.data_dir or config.data_dir,
        limit_eval=arguments.limit_eval,
        limit_autoattack=None,
        eval_batch_size=arguments.batch_size,
    )
    configuration.validate(config, method)
    which = ["best", "last"] if arguments.checkpoint == "both" else [arguments.checkpoint]
    for name in which:
        runs.weights_in(arguments.run, name)
    hardware = device.choose(arguments.device, "fp32")
    data = runs.load_data(config, hardware.device)
    for name in which:
        pipeline.evaluate_checkpoint(config, data, hardware, name, attacks, arguments.again)
    log.say(tables.render([arguments.run]))


if __name__ == "__main__":
    main()
