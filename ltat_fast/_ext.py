"""Load the optional C++ extension ``ltat_fast._C``, or keep the reason why it cannot be loaded.

``HAS_EXT`` is True if it is loaded. ``WHY_NOT`` is the reason if it is not, else ''. ``C`` is the module or None.
Importing this file never fails: without the extension the ops run plain torch.
"""

import re
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

# Raise this number when a schema or a C++ function changes its arguments, so that older libraries are refused. A new op
# does not need it. setup.py compiles the number into the library.
SCHEMA_VERSION = "4"
INSTALL = "pip install --no-build-isolation -e ."
_STAMP = re.compile(rb"ltat-fast-build:schema=([^;\0]*);torch=([^;\0]*);")


def _mismatch(library: Path) -> str:
    """Return the reason why ``library`` must not be loaded, or ''.

    The reason comes from the build stamp in the file's bytes. A library built for another torch can crash the process
    while it loads, where no exception handler helps.
    """
    stamp = _STAMP.search(library.read_bytes())
    if stamp is None:
        return f"{library.name} has no build stamp: rebuild with {INSTALL}"
    schema, built_for = (group.decode() for group in stamp.groups())
    if schema != SCHEMA_VERSION:
        return f"{library.name} has op schema {schema}, this code needs {SCHEMA_VERSION}: rebuild with {INSTALL}"
    if built_for != torch.__version__:
        return f"{library.name} was built for torch {built_for}, this is {torch.__version__}: rebuild with {INSTALL}"
    return ""


def _load(folder: Path) -> tuple[ModuleType | None, str]:
    """Return the extension in ``folder`` and '', or None and the reason why it is not loaded."""
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
