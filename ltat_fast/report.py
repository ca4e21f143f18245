"""Report: finished runs as the paper's table, mean and standard deviation over seeds.

python -m ltat_fast.report RUN...
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from ltat_fast.engine import tables
from ltat_fast.errors import UserError, exit_on_user_error


@dataclass(frozen=True)
class Arguments:
    """Finished runs as the paper's table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """run folders; those that differ in the seed alone become one row"""


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m ltat_fast.report", args=argv)
    if not arguments.runs:
        raise UserError("name at least one run folder")
    print(tables.render(list(arguments.runs)))


if __name__ == "__main__":
    main()
