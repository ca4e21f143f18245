"""Command line of the export: write a trained network as standard files that do not need this package.

python -m ltat_fast.export RUN [--checkpoint best|last] [--out DIR]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import cli
from ltat_fast.errors import exit_on_user_error
from ltat_fast.out_of_memory import explained
from ltat_fast.runs import log
from ltat_fast.runs.export import export


@dataclass(frozen=True)
class Arguments:
    """Export a trained network as a folder for the Hugging Face hub: safetensors, torch code, torch.export, ONNX."""

    run: tyro.conf.Positional[Path]
    """run folder"""
    checkpoint: Literal["best", "last"] = "last"
    """weights to export"""
    out: Path | None = None
    """folder to write; default: RUN/export-<checkpoint>"""
    image_size: int | None = None
    """height and width of the images, if the run did not record them"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, "python -m ltat_fast.export", argv)
    out = arguments.out or arguments.run / f"export-{arguments.checkpoint}"
    with explained("export on a machine with more free memory"):
        files = export(arguments.run, arguments.checkpoint, out, arguments.image_size)
    for file in files:
        log.say(f"{file}  {file.stat().st_size / 2**20:.2f} MiB")
    log.say(f"In {out}: from model import load_model; model = load_model(); logits = model(images)")


if __name__ == "__main__":
    main()
