"""Check the values of a dataclass against the types of its fields, for settings that were read from a file."""

import dataclasses
import types
import typing
from typing import Any, Literal

from ltat_fast.errors import UserError


def check_types(settings: Any) -> None:
    """Raise UserError, naming the flag, for the first field of ``settings`` whose value does not have its type."""
    kinds = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), kinds[field.name]
        if not _fits(value, kind):
            wanted = typing.get_args(kind) if typing.get_origin(kind) is Literal else getattr(kind, "__name__", kind)
            raise UserError(f"--{field.name.replace('_', '-')} takes {wanted}, not {value!a:.80}")


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if isinstance(value, bool):  # Python counts True as an int
        return kind is bool
    if kind is float and isinstance(value, int):
        return abs(value) < 2**53  # integers that a float represents exactly
    if kind is int and isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, kind)
