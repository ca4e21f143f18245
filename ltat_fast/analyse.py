"""Command line of the analysis: gradients, linearity, corruptions and accuracy by class frequency of finished runs.

python -m ltat_fast.analyse RUN... [--teacher PATH] [--parts alignment,linearity]     # docs/analysis.md
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import cli
from ltat_fast.analysis import runner
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import log
from ltat_fast.training import device as devices


@dataclass(frozen=True)
class Arguments:
    """Measure alignment with the teacher, local linearity, inequality, corruptions, and accuracy by class frequency."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; corruptions are measured on the images that all of these runs classify correctly"""
    parts: str = ",".join(runner.PARTS)
    """parts to measure, comma-separated"""
    measurement: tyro.conf.OmitArgPrefixes[runner.Options] = field(default_factory=runner.Options)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device to measure on; auto: cuda if a GPU is present"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, "python -m ltat_fast.analyse", argv)
    parts = runner.parse_parts(arguments.parts)
    if not arguments.runs:
        raise UserError("name at least one run folder")
    for name in ("limit", "batch_size"):
        if (value := getattr(arguments.measurement, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    hardware = devices.choose(arguments.device, "fp32")
    runs, measurement = list(dict.fromkeys(arguments.runs)), arguments.measurement
    with explained(f"use a smaller --batch-size (it is {measurement.batch_size}); finished parts are kept"):
        log.say(runner.analyse(runs, parts, measurement, hardware))


if __name__ == "__main__":
    main()
