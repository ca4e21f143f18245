"""``ltat_fast.train`` that records, every tenth epoch, how many bytes are in use and how many objects exist.

The memory of a process includes free space that the allocator keeps. These counts do not, so a slow leak shows.
"""

import ctypes
import gc
import os

from ltat_fast import train
from ltat_fast.runs.records import StageLog


class Mallinfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Mallinfo
record = StageLog.epoch


def record_and_count(stage: StageLog, entry: dict) -> None:
    record(stage, entry)
    if entry["epoch"] % 10 == 0:
        gc.collect()
        memory = libc.mallinfo2()
        with open(os.environ["LTAT_SOAK_COUNTS"], "a") as file:
            in_use = (memory.uordblks + memory.hblkhd) / 1024
            print(os.getpid(), entry["epoch"], in_use, len(gc.get_objects()), file=file)


StageLog.epoch = record_and_count

if __name__ == "__main__":
    raise SystemExit(train.main())
