"""Settings of torch that may speed up the step, each a flag of ``bench.step`` and ``bench.codegen``.

The optimisations of our own step are rows of ``bench.step`` instead.

A lever is an entry of :data:`LEVERS`. Its settings are active while a row is built and timed.
"""

import argparse
import contextlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Lever:
    """settings: dotted name of an attribute to the value that it has while the lever is on."""

    help: str
    settings: dict[str, object]


LEVERS = {
    "search-all-convolutions": Lever(
        "let cuDNN's search try every algorithm instead of the first ten",
        {"torch.backends.cudnn.benchmark_limit": 0},
    ),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    for name, lever in LEVERS.items():
        parser.add_argument(f"--{name}", action="store_true", help=lever.help)


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the levers whose flags are set."""
    return [name for name in LEVERS if getattr(args, name.replace("-", "_"))]


@contextlib.contextmanager
def pulled(names: list[str]) -> Iterator[None]:
    """Apply the settings of the levers ``names`` inside a ``with`` block.

    Raises SystemExit if this torch does not have a setting.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            for setting, value in LEVERS[name].settings.items():
                owner, _, attribute = setting.rpartition(".")
                target = pkgutil.resolve_name(owner)
                if not hasattr(target, attribute):
                    raise SystemExit(f"--{name}: this torch has no {setting}")
                stack.callback(setattr, target, attribute, getattr(target, attribute))
                setattr(target, attribute, value)
        yield
