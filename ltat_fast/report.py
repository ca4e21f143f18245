"""Report: finished runs as the paper's table, mean and standard deviation over seeds; on request as a page.

python -m ltat_fast.report RUN... [--html FILE] [--markdown FILE] [--csv FILE]
"""

import ltat_fast.entry_point  # noqa: F401  (before torch)

# isort: split
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ltat_fast import files
from ltat_fast.errors import UserError, exit_on_user_error
from ltat_fast.reporting import tabular
from ltat_fast.runs import tables
from ltat_fast.training import device


@dataclass(frozen=True)
class Arguments:
    """Finished runs as the paper's table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; those that differ in the seed alone become one row"""
    html: Path | None = None
    """write a page with plots, pictures and the evaluation protocol; it loads nothing from elsewhere"""
    markdown: Path | None = None
    """write the table in Markdown"""
    csv: Path | None = None
    """write every accuracy, one a line: run, checkpoint, attack, group of classes or class"""
    data_dir: Path | None = None
    """where the images for the page are now, if not where the runs found them"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the pictures of the page are computed"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.report", args=argv)
    if not arguments.runs:
        raise UserError("name at least one run folder")
    runs = list(arguments.runs)
    print(tables.render(runs))
    found = tables.experiments(runs)
    if arguments.csv:
        _write(arguments.csv, tabular.as_csv(found))
    if arguments.markdown:
        _write(arguments.markdown, tabular.as_markdown(found))
    if arguments.html:
        from ltat_fast.reporting import page  # matplotlib and jinja2 take a second that the table need not wait for

        chosen = device.choose(arguments.device, "fp32").device
        _write(arguments.html, page.render(found, chosen, arguments.data_dir))


def _write(path: Path, text: str) -> None:
    content = text.encode()
    if path.is_symlink() or (path.exists() and not path.is_file()):  # /dev/stdout, a pipe: not to be replaced
        with files.oserror_as_user_error(path):
            path.write_bytes(content)
    else:
        with files.atomic_write(path) as file:
            file.write(content)
    print(f"{path}: {len(content) / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
