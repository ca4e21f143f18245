"""Report: print finished runs as the paper's table, with mean and standard deviation over seeds, or write a page.

python -m ltat_fast.report RUN... [--html FILE] [--markdown FILE] [--csv FILE]
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import cli
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.reporting import tabular
from ltat_fast.reporting.output import write
from ltat_fast.runs import log, tables
from ltat_fast.runs.experiments import experiments
from ltat_fast.training import device


@dataclass(frozen=True)
class Arguments:
    """Print finished runs as the paper's table; write them as a page, Markdown or CSV."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; runs that differ only in the seed become one row"""
    html: Path | None = None
    """write an HTML page with plots, pictures and the evaluation protocol; it loads nothing from the network"""
    markdown: Path | None = None
    """write the table as Markdown"""
    csv: Path | None = None
    """write every accuracy as CSV, one per line: run, checkpoint, attack, group of classes or class"""
    data_dir: Path | None = None
    """folder of the images for the page, if they were moved since the runs"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """device that computes the pictures of the page; auto: cuda if a GPU is present"""
    trust_run: cli.TrustRun = False


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = cli.parse(Arguments, "python -m ltat_fast.report", argv)
    if not arguments.runs:
        raise UserError("name at least one run folder")
    log.say(tables.render(arguments.runs))
    found = experiments(arguments.runs)
    if arguments.csv:
        write(arguments.csv, tabular.as_csv(found))
    if arguments.markdown:
        write(arguments.markdown, tabular.as_markdown(found))
    if arguments.html:
        from ltat_fast.reporting import page  # matplotlib and jinja2 take a second to import

        chosen = device.choose(arguments.device, "fp32").device
        write(arguments.html, page.render(found, chosen, arguments.data_dir))


if __name__ == "__main__":
    main()
