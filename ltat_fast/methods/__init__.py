"""The training methods, keyed by the name that ``--method`` takes. A new method is one file here and one line below."""

from ltat_fast.methods.adaad import AdaAd
from ltat_fast.methods.adaiad import AdaIad
from ltat_fast.methods.akd import Akd
from ltat_fast.methods.ard import Ard
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.awp import Awp
from ltat_fast.methods.base import Method, MethodContext
from ltat_fast.methods.iad import Iad
from ltat_fast.methods.igd import Igd
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.mart import Mart
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.reat import Reat
from ltat_fast.methods.robal import Robal
from ltat_fast.methods.rslad import Rslad
from ltat_fast.methods.taet import Taet
from ltat_fast.methods.trades import Trades

_ALL = (Natural, PgdAt, Trades, Mart, Awp, Robal, Reat, AtBsl, Taet, Ltat, Ard, Iad, Akd, Rslad, AdaAd, AdaIad, Igd)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}

__all__ = ["METHODS", "Method", "MethodContext"]
