"""``ltat_fast.train`` with a method ``leaky``, which leaks memory and an open file in each epoch.

The memory comes from the system: the allocator would first use up its free space, where the first leaks would not show.
"""

import mmap
from dataclasses import dataclass

from ltat_fast import train
from ltat_fast.methods import METHODS
from ltat_fast.methods.natural import Natural

LEAKED = []
BYTES = 2**22


@dataclass
class Leaky(Natural):
    name = "leaky"

    def on_epoch_start(self, epoch: int) -> None:
        memory = mmap.mmap(-1, BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.write(bytes(BYTES))
        LEAKED.append((memory, open(__file__)))  # noqa: SIM115 - the leak


METHODS["leaky"] = Leaky

if __name__ == "__main__":
    raise SystemExit(train.main())
