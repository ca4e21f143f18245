"""The training methods, by the name ``--method`` takes. A new one is a file here and a line below."""

from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.base import Method, Setting
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt

METHODS: dict[str, type[Method]] = {method.name: method for method in (PgdAt, AtBsl, Ltat, Natural)}

__all__ = ["METHODS", "Method", "Setting"]
