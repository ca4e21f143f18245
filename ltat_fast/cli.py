"""Parse the flags of every entry point with tyro, with help texts that wrap as whole paragraphs."""

import dataclasses
import functools
import sys
import typing
from typing import Annotated, TypeVar

import docstring_parser
import tyro

from ltat_fast import trust

T = TypeVar("T")
TrustRun = Annotated[
    bool,
    tyro.conf.FlagCreatePairsOff,
    tyro.conf.arg(
        help="run the code that the files of the run name (module: networks and teachers) and let them choose the "
        "folder of downloads; only for a run whose author you trust (SECURITY.md)"
    ),
]
"""type of the flag --trust-run of every command that reads a run"""


def parse(arguments: type[T], prog: str, args: list[str] | None, description: str | None = None) -> T:
    """Parse ``args`` (``sys.argv[1:]`` if None) into an instance of the dataclass ``arguments``.

    prog: the command in the usage line. description: what the command does; the docstring of ``arguments`` if None.
    Raises SystemExit for ``--help`` and for flags that do not exist or do not fit their types.
    """
    _join_help_lines(arguments)
    parsed = tyro.cli(tyro.conf.OmitArgPrefixes[arguments], prog=prog, args=args, description=description)
    trust.follow(sys.argv[1:] if args is None else args, getattr(parsed, "trust_run", False))
    return parsed


def _join_help_lines(cls: type) -> None:
    """Join the lines of every field's docstring, for ``cls`` and for the dataclasses among its fields.

    tyro keeps the line breaks of the source, which would then break the sentences of the help in odd places.
    """
    for owner in cls.__mro__:
        if dataclasses.is_dataclass(owner):
            _join_own_help_lines(owner)
    for hint in typing.get_type_hints(cls).values():
        if dataclasses.is_dataclass(hint):
            _join_help_lines(hint)


@functools.cache  # once per class: a second annotation would contradict the first
def _join_own_help_lines(cls: type) -> None:
    texts = {p.arg_name: p.description for p in docstring_parser.parse_from_object(cls).params}
    for field in dataclasses.fields(cls):
        text = texts.get(field.name)
        if text and field.name in cls.__annotations__:
            field.type = Annotated[field.type, tyro.conf.arg(help=" ".join(text.split()))]
            cls.__annotations__[field.name] = field.type
