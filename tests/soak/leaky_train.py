"""``ltat_fast.train`` with a method ``leaky``, whose every epoch loses memory and an open file."""

from dataclasses import dataclass

from ltat_fast import train
from ltat_fast.methods import METHODS
from ltat_fast.methods.natural import Natural

LOST = []


@dataclass
class Leaky(Natural):
    name = "leaky"

    def on_epoch_start(self, epoch: int) -> None:
        LOST.append((bytearray(b"x" * 2**22), open(__file__)))  # noqa: SIM115 - the leak


METHODS["leaky"] = Leaky

if __name__ == "__main__":
    raise SystemExit(train.main())
