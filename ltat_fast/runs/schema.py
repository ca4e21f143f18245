"""What the JSON of weights files and saved states must hold: names, types, ranges, and what must agree.

Whoever wrote a run folder can compute its checksums, so nothing in it is used before it is checked here or, for
config.json, env.json and eval.json, by the classes that read them (:mod:`ltat_fast.config`,
:mod:`ltat_fast.runs.finished`, :mod:`ltat_fast.runs.results`) with the same predicates.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ltat_fast.errors import UserError
from ltat_fast.runs.json_object import (
    JsonObject,
    Predicate,
    is_bool,
    is_count,
    is_number,
    is_object,
    is_text,
    list_of,
    optional,
)

MAX_CLASSES = 1_000_000  # far above any dataset; a network for 10^8 classes would fill the memory
MAX_CHANNELS = 4096
MAX_SIDE = 2**16
MAX_POSITION = 2**53


def between(smallest: int, largest: int) -> Predicate:
    """Return whether a value is an integer in this range, its ends included."""
    return lambda value: is_count(value) and smallest <= value <= largest


def object_of(valid: Predicate) -> Predicate:
    """Return whether a value is an object all of whose values are ``valid``."""
    return lambda value: is_object(value) and all(map(valid, value.values()))


def _is_pair(valid: Predicate) -> Predicate:
    return lambda value: list_of(valid)(value) and len(value) == 2


CARD: dict[str, Predicate] = {
    "arch": is_text,
    "activation": is_text,
    "num_classes": between(1, MAX_CLASSES),
    "in_channels": between(1, MAX_CHANNELS),
    "image_size": _is_pair(between(1, MAX_SIDE)),
    "class_names": list_of(is_text),
    "dataset": is_text,
    "imbalance_ratio": optional(is_number),
    "method": is_text,
    "method_options": is_object,
    "class_counts": list_of(between(0, MAX_POSITION)),
    "eps": is_text,
    "epoch": between(0, MAX_POSITION),
    "version": is_text,
    "modifiers": is_object,
    "scores": object_of(is_number),
}
"""The card of best.safetensors and last.safetensors. Cards of earlier versions lack some of the entries."""

PROGRESS: dict[str, Predicate] = {
    "epoch": between(0, MAX_POSITION),
    "step": between(0, MAX_POSITION),
    "finished": is_bool,
    "best": object_of(is_number),
    "sums": object_of(is_number),
    "seconds": is_number,
    "recorded": object_of(is_number),
    "skipped": lambda value: value == [] or _is_pair(between(0, MAX_POSITION))(value),
}
"""The position in resume.safetensors: :class:`ltat_fast.runs.checkpoint.Progress`."""

DUMP: dict[str, Predicate] = {
    "stage": lambda value: value in ("teacher", "student"),
    "found": is_text,
    "epoch": between(0, MAX_POSITION),
    "step": between(0, MAX_POSITION),
    "backend": is_text,
    "processes": between(1, 2**20),
    "arguments": object_of(is_number),
}
"""The card of a batch that gave numbers that are not finite, which ``python -m ltat_fast.replay`` repeats."""


def check(file: Path, content: Any, entries: Mapping[str, Predicate], needed: tuple[str, ...] = ()) -> None:
    """Raise UserError, naming the entry, unless ``content``, read from ``file``, fits ``entries``.

    needed: the entries that must be there.
    """
    found = JsonObject(file, content)
    for name in needed:
        found.take(name, entries[name])
    for name in found.content.keys() & entries.keys():
        found.take(name, entries[name])


def check_card(file: Path, card: dict) -> None:
    """Check the card of a weights file, and that its entries agree on the number of classes. Raises UserError."""
    check(file, card, CARD)
    for name in ("class_names", "class_counts"):
        if "num_classes" in card and len(card.get(name, ())) not in (0, card["num_classes"]):
            said = f"{name} has {len(card[name])} classes, num_classes is {card['num_classes']}"
            raise UserError(f"{file} is damaged: {said}")
    if "method" in card and not {"method_options", "class_counts"} <= card.keys():
        raise UserError(f"{file} is damaged: method_options or class_counts is missing")
