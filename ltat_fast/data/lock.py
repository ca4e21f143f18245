"""One process at a time."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such locks on this system; files are still only ever renamed into place
    fcntl = None


@contextlib.contextmanager
def exclusive(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``, after whoever holds it now; the system lets go when a process ends, however it ends.

    Raises:
        OSError: the file cannot be made, or its file system has no locks.
    """
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another process to finish with {path.with_suffix('')}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
