"""Command line of the evaluation: attack a finished run, add the results to RUN/eval.json and print its table.

    python -m ltat_fast.evaluate RUN [--checkpoint best] [--attacks clean,fgsm,pgd20,cw20,autoattack]

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
from ltat_fast.errors import EXIT_INTERRUPTED, exit_on_user_error
from ltat_fast.files import refuse_read_only
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import log, tables
from ltat_fast.runs.results import EvalFile
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import weights_file
from ltat_fast.signals import Interrupted, leave, stop_at_once
from ltat_fast.training import device
from ltat_fast.training.evaluation import evaluate_checkpoints


@dataclass(frozen=True)
class Arguments:
    """Evaluate a run. Each attack is written to its eval.json when it ends, so an interrupted evaluation can resume."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    checkpoint: Literal["best", "last", "both"] = "both"
    """weights to evaluate"""
    attacks: Annotated[str, tyro.conf.arg(help=f"attacks to run, comma-separated: {CHOICES}")] = (
        "clean,pgd20,autoattack"
    )
    limit_eval: int | None = None
    """use only this many test images, spread evenly over the classes"""
    limit_autoattack: int | Literal["run", "none"] = "run"
    """use at most this many images for AutoAttack; run: the limit in the settings of the run; none: no such limit"""
    data_dir: Path | None = None
    """folder of the images, if they were moved since the run"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to evaluate on; auto: cuda if a GPU is present"""
    batch_size: int = 256
    """images per batch"""
    again: bool = False
    """run attacks even if their results are already in eval.json"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    """Return the exit status."""
    arguments = cli.parse(Arguments, "python -m ltat_fast.evaluate", argv)
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
    evaluated = EvalFile.load_or_empty(arguments.run / "eval.json")
    if arguments.again or not all(evaluated.result(name, attack) for name in which for attack in attacks):
        refuse_read_only(arguments.run)  # checked early; whether stored results fit the test set is known only later
    hardware = device.choose(arguments.device, "fp32")
    try:
        with stop_at_once(), explained("evaluate on a device with more free memory (--device)"):
            data = load_splits(config, hardware.device)
            evaluate_checkpoints(config, data, hardware, which, attacks, arguments.again)
    except Interrupted as error:
        flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--again"]
        log.say(f"{error}; resume with: python -m ltat_fast.evaluate {shlex.join(flags)}")
        return EXIT_INTERRUPTED
    log.say(tables.render([arguments.run]))
    return 0


if __name__ == "__main__":
    leave(main())
