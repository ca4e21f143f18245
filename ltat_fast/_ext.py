"""Loads the optional C++ extension ``ltat_fast._C``; says why where it cannot.

``HAS_EXT`` tells whether it runs, ``WHY_NOT`` holds the reason if not ('' if it does), ``C`` is the module or None.
Importing this file never fails: without the extension the ops run plain torch.
"""

import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

SCHEMA_VERSION = "1"  # LTAT_SCHEMA_VERSION of csrc/ops.h: the op schemas and kernel arguments this Python code is for
INSTALL = "pip install --no-build-isolation -e ."
_STAMP = re.compile(rb"ltat-fast-build:schema=([^;\0]*);torch=([^;\0]*);")


def _mismatch(library: Path) -> str:
    """What keeps ``library`` from being loaded, or ''.

    Read from the stamp in the file's bytes: a library built against another torch can take the process down while it
    loads, where no exception handler helps.
    """
    stamp = _STAMP.search(library.read_bytes())
    if stamp is None:
        return f"{library.name} carries no build stamp: rebuild with {INSTALL}"
    schema, built_for = (group.decode() for group in stamp.groups())
    if schema != SCHEMA_VERSION:
        return f"{library.name} has op schema {schema}, this code needs {SCHEMA_VERSION}: rebuild with {INSTALL}"
    if built_for != torch.__version__:
        return f"{library.name} was built for torch {built_for}, this is {torch.__version__}: rebuild with {INSTALL}"
    return ""


def _load(folder: Path) -> tuple[ModuleType | None, str]:
    """The extension in ``folder`` and '', or None and the reason."""
    library = next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_C{suffix}").exists()), None)
    if library is None:
        others = ", ".join(path.name for path in folder.glob("_C.*"))
        built = f"built only for another Python ({others})" if others else "not built"
        return None, f"C++ extension {built}: {INSTALL}"
    try:
        if why_not := _mismatch(library):
            return None, why_not
        from ltat_fast import _C
    except (ImportError, OSError) as error:
        return None, f"{library.name} does not load ({error}): rebuild with {INSTALL}"
    return _C, ""


C, WHY_NOT = _load(Path(__file__).parent)
HAS_EXT = C is not None
