"""Read the JSON files of a run field by field.

A damaged file raises UserError, whose message names the file, the place in it and the value found there. Values are
checked by predicates such as :func:`is_text`; :func:`optional` and :func:`list_of` combine them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ltat_fast.errors import UserError

Predicate = Callable[[Any], bool]
REQUIRED = object()


@dataclass(frozen=True)
class JsonObject:
    """An object in a JSON file. place: the names that lead to it, for error messages; empty for the whole file."""

    file: Path
    content: dict[str, Any]
    place: tuple[str, ...] = ()

    def __post_init__(self):
        if not isinstance(self.content, dict):
            raise UserError(f"{self.file} is damaged: {', '.join(self.place) or 'it'} is not a JSON object")

    @classmethod
    def load(cls, file: Path) -> "JsonObject":
        """Read the object in ``file``. Raises UserError if the file is missing, damaged or not a JSON object."""
        try:
            content = json.loads(file.read_text())
            json.dumps(content, ensure_ascii=False).encode()  # raises for lone surrogates, which cannot be printed
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{file.parent} has no results: {file.name} does not exist") from None
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged and cannot be read ({error})") from None
        return cls(file, content)

    def take(self, name: str, valid: Predicate, default: Any = REQUIRED) -> Any:
        """Return the value of ``name``, or ``default`` if there is none. Raises UserError if it is not ``valid``."""
        value = self.content.get(name, default)
        if value is REQUIRED:
            raise self.damaged(f"{name} is missing")
        if name in self.content and not valid(value):
            raise self.damaged(f"{name} is {_shown(value)}")
        return value

    def object(self, name: str) -> "JsonObject":
        """The object called ``name``; an empty object if there is none."""
        return JsonObject(self.file, self.content.get(name, {}), (*self.place, name))

    def objects(self) -> Iterator[tuple[str, "JsonObject"]]:
        """Yield every name with its value. Raises UserError for a value that is not an object."""
        for name in self.content:
            yield name, self.object(name)

    def list_of_objects(self, name: str) -> list["JsonObject"]:
        """The objects in the list called ``name``."""
        place = (*self.place, name)
        try:
            return [JsonObject(self.file, each, place) for each in self.take(name, is_list)]
        except UserError:
            raise self.damaged(f"{name} is not a list of JSON objects") from None

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.file} is damaged: {', '.join([*self.place, what])}")


def _shown(value: Any) -> str:
    try:
        return f"{json.dumps(value):.40}"
    except ValueError:  # an integer with thousands of digits
        return "a huge number"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def is_number(value: Any) -> bool:
    """Whether ``value`` is a float (NaN and infinity included) or an int in the range of floats."""
    return isinstance(value, float) or (is_integer(value) and abs(value) <= sys.float_info.max)


def is_percent(value: Any) -> bool:
    return is_number(value) and 0 <= value <= 100


def optional(valid: Predicate) -> Predicate:
    return lambda value: value is None or valid(value)


def list_of(valid: Predicate) -> Predicate:
    return lambda value: is_list(value) and all(map(valid, value))
