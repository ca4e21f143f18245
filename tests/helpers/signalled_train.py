"""``ltat_fast.train`` that sends itself a signal at a chosen file operation, so that no test has to hit a moment.

A run changes the disk only by file operations: "write PATH" (a file is opened for writing), "rename PATH" (to PATH),
"remove PATH" and "mkdir PATH". PATH is relative to the run folder. Two environment variables control this script:

LTAT_SIGNAL: "SIGKILL 2 write metrics.jsonl" sends SIGKILL before the second operation that starts with these words.
Without words every operation counts.
LTAT_OPERATIONS: a file to which each operation is appended, one per line.

The speed of the machine is not measured here, which saves seconds per start.
"""

import os
import signal
import sys
import threading

from ltat_fast import train
from ltat_fast.signals import leave
from ltat_fast.training import speed

PATH_OF_EVENT = {"open": 0, "os.rename": 1, "os.remove": 0, "os.mkdir": 0}
WRITING = os.O_WRONLY | os.O_RDWR


class SignalAtOperation:
    """An audit hook that counts the file operations of the main thread in ``run_dir``."""

    def __init__(self, run_dir: str):
        self.prefix = os.path.join(run_dir, "")
        name, count, *words = os.environ.get("LTAT_SIGNAL", "SIGTERM 0").split(" ", 2)
        self.signal, self.left, self.words = signal.Signals[name], int(count), "".join(words)
        self.record = open(os.environ.get("LTAT_OPERATIONS", os.devnull), "a")  # noqa: SIM115 - open to the end

    def __call__(self, event: str, args: tuple) -> None:
        if event not in PATH_OF_EVENT or threading.current_thread() is not threading.main_thread():
            return
        path = args[PATH_OF_EVENT[event]]
        reading = event == "open" and not args[2] & WRITING
        if reading or not isinstance(path, str | os.PathLike) or not str(path).startswith(self.prefix):
            return
        verb = "write" if event == "open" else event.removeprefix("os.")
        operation = f"{verb} {str(path).removeprefix(self.prefix)}"
        print(operation, file=self.record, flush=True)
        if operation.startswith(self.words):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signal)


def main() -> int:
    speed.matmul_ceiling = lambda device, dtype: 1e12
    sys.addaudithook(SignalAtOperation(sys.argv[sys.argv.index("--out") + 1]))
    return train.main()


if __name__ == "__main__":
    leave(main())
