"""The JSON files of a run as they are read: what is damaged is one sentence, not a traceback where it is used."""

import json
from collections.abc import Callable
from pathlib import Path

from ltat_fast.errors import UserError


def read_json(path: Path) -> dict:
    """The object in a JSON file of a run. Raises UserError if it is not there or damaged."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path.parent} has no results: {path.name} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged and cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content


def read_results(path: Path) -> dict:
    """The content of an eval.json, by checkpoint. Raises UserError if it is not there or damaged."""
    results = read_json(path)
    for which, entry in results.items():
        if fault := _fault(entry):
            raise UserError(f"{path} is damaged: {which}{fault}")
    return results


def _fault(entry: object) -> str | None:
    """What is not as an evaluation writes it in the results of a checkpoint, if anything."""
    if not isinstance(entry, dict):
        return " is not a JSON object"
    checks = entry.get("checks", [])
    if not (isinstance(checks, list) and all(isinstance(check, dict) for check in checks)):
        return ", checks is not a list of JSON objects"
    for attack, result in entry.items():
        if attack == "checks":
            continue
        if not isinstance(result, dict):
            return f", {attack} is not a JSON object"
        for name, value in result.items():
            if name in VALID and not VALID[name](value):
                return f", {attack}, {name} is {json.dumps(value)[:40]}"
    return None


def _is_percent(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100)


def _is_list_of(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(valid, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# Whether a value of an attack's result is as it should be. Names that are not here are not relied on.
VALID: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("all", "head", "medium", "tail"), _is_percent),
    "per_class": _is_list_of(_is_percent),
    "images": lambda value: type(value) is int and value >= 0,
    "attacks": _is_list_of(_is_text),
    "chosen": _is_text,
}
