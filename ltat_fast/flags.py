"""The command line of ``python -m ltat_fast.train``: flags to a validated :class:`~ltat_fast.config.Config`."""

import argparse
import contextlib
import dataclasses
import io
import sys
from pathlib import Path

from ltat_fast import cli
from ltat_fast.config import GROUPS, METHOD_PRESETS, PRESETS, Config, choose, load, preset, validate
from ltat_fast.methods import METHODS, Method


def parse_args(argv: list[str] | None = None) -> tuple[Config, Method]:
    """Parse the flags in ``argv`` (``sys.argv[1:]`` if None) on top of their defaults.

    The defaults are the preset of the dataset, or the settings of the run with ``--resume``. Raises UserError for
    settings that cannot work, and SystemExit for ``--help`` and for flags that do not exist.
    """
    argv = sys.argv[1:] if argv is None else argv
    config, method = _defaults(argv)
    fields = [(name, group, _group_of(config, group)) for name, group in GROUPS.items()]
    fields += [("method", type(method), method), ("trust_run", cli.TrustRun, False)]
    arguments = dataclasses.make_dataclass(
        "Arguments",
        [(name, kind, dataclasses.field(default_factory=lambda value=value: value)) for name, kind, value in fields],
    )
    description = "Long-tailed adversarial training: balanced self-teacher, then student."
    parsed = cli.parse(arguments, "python -m ltat_fast.train", argv, description)
    config = Config(**{name: value for group in GROUPS for name, value in vars(getattr(parsed, group)).items()})
    validate(config, parsed.method)
    return config, parsed.method


def _group_of(config: Config, group: type) -> object:
    """The settings of ``config`` that belong to ``group``."""
    return group(**{field.name: getattr(config, field.name) for field in dataclasses.fields(group)})


def _defaults(argv: list[str]) -> tuple[Config, Method]:
    """Return the configuration that the flags change: the preset of the dataset, or that of the run to resume."""
    seen = _first_look(argv)
    if seen.resume and seen.out and (seen.out / "config.json").exists():
        config, method = load(seen.out)
        if seen.method not in (None, method.name):
            choose("method", seen.method, METHODS)
            method = METHODS[seen.method]()
        return dataclasses.replace(config, out=seen.out), method
    choose("dataset", seen.dataset, PRESETS)
    name = seen.method or Config.method
    choose("method", name, METHODS)
    config = Config(dataset=seen.dataset, **preset(seen.settings, seen.dataset, name))
    presets = (METHOD_PRESETS.get((key, name), {}) for key in (seen.dataset, seen.arch or config.arch))
    return config, METHODS[name](**{option: value for preset in presets for option, value in preset.items()})


def _first_look(argv: list[str]) -> argparse.Namespace:
    """The flags on which the presets and the flags of the method depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset", default=Config.dataset)
    parser.add_argument("--method")
    parser.add_argument("--arch")
    parser.add_argument("--settings", default=Config.settings)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro reports the error later
            return parser.parse_known_args(argv)[0]
    except SystemExit:
        return parser.parse_args([])
