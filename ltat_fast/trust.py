"""What a command may do because of the files of a run, which somebody else may have written (SECURITY.md).

A run names code (``module:`` networks and teachers) and a folder of images. Both are used as far as the user named them
on the command line of this process, or with ``--trust-run``. Without a command, in Python, the caller decides; only the
card of a weights file still needs :func:`allow_module`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ltat_fast.errors import UserError

MODULE = "module:"


@dataclass
class Command:
    """What the user named. trust_run: everything that the files of a run name is allowed."""

    trust_run: bool = False
    modules: set[str] = field(default_factory=set)
    folders: set[Path] = field(default_factory=set)


_command: Command | None = None
_allowed_modules: set[str] = set()


def follow(argv: Sequence[str], trust_run: bool) -> None:
    """Let this process use what stands in ``argv``, the command line, and nothing else that only a file names."""
    global _command
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = [word.replace("_", "-") for word in words]
    folders = {Path(words[i + 1]) for i, flag in enumerate(flags[:-1]) if flag == "--data-dir"}
    _command = Command(trust_run, {word for word in words if word.startswith(MODULE)}, folders)


def reset() -> None:
    """Forget the command line and the modules of :func:`allow_module`."""
    global _command
    _command = None
    _allowed_modules.clear()


def allow_module(spec: str) -> None:
    """Let the card of a weights file name ``spec``, "module:PACKAGE.MODULE:NAME". For Python code."""
    _allowed_modules.add(spec)


def refuse_code(spec: str, source: str, from_card: bool = False) -> None:
    """Raise UserError if ``spec`` names code that the user did not name.

    source: begins the message. from_card: ``spec`` is from the card of a weights file, never from Python code.
    """
    if not spec.startswith(MODULE) or spec in _allowed_modules:
        return
    if _command is None:
        if not from_card:
            return
        named = f"call ltat_fast.trust.allow_module({spec!r}) if you trust it"
    else:
        if _command.trust_run or spec in _command.modules:
            return
        named = "it runs only if you name it on the command line too, or with --trust-run"
    raise UserError(f"{source} names the code {spec!a:.200}, which is not run: {named} (SECURITY.md)")


def may_write(data_dir: Path | None) -> bool:
    """Whether to download to ``data_dir``, to unpack and to keep decoded images there. None: the default folder."""
    return data_dir is None or _command is None or _command.trust_run or data_dir in _command.folders
