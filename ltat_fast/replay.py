"""Replay a training step whose loss or weights were not finite, and print the first tensor that is not finite.

    python -m ltat_fast.replay RUN/nan/epoch-3-step-17.safetensors

The file holds the batch, the seed and all tensors that the step starts from. The run folder must still exist; the
images and the teacher are loaded from the folders that the run used. The step runs in eager mode, whatever backend the
run used.

Exit status: 0 a number is not finite again; 1 all numbers are finite; 2 the file, the run or the data is wrong, or
out of memory.
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import cli
from ltat_fast.errors import exit_on_user_error
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import log
from ltat_fast.training.replay import replay

SHOWN = 8  # findings to print; a number that is not finite soon spreads to every tensor


@dataclass(frozen=True)
class Arguments:
    """Replay a training step whose loss or weights were not finite."""

    dump: tyro.conf.Positional[Path]
    """file in the nan/ folder of a run or of its teacher"""
    data_dir: Path | None = None
    """folder of the images, if they were moved since the run"""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """device to replay on; default: the device of the run"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> int:
    arguments = cli.parse(Arguments, "python -m ltat_fast.replay", argv)
    with explained("replay on a device with more free memory, for example with --device cpu"):
        findings = replay(arguments.dump, arguments.data_dir, arguments.device)
    for finding in findings[:SHOWN]:
        log.say(f"not finite: {finding}")
    if len(findings) > SHOWN:
        log.say(f"... and {len(findings) - SHOWN} more after these")
    log.say(f"first: {findings[0]}" if findings else "every number is finite: the problem did not occur again")
    return 0 if findings else 1


if __name__ == "__main__":
    raise SystemExit(main())
