"""Writing files safely: atomic replacement, locks, and operating-system errors as one sentence for the user."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ltat_fast.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks; files are still replaced by a rename
    fcntl = None


@contextlib.contextmanager
def oserror_as_user_error(path: Path) -> Iterator[None]:
    """Raise UserError about ``path`` for an OSError inside, for example a full disk."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; files saved earlier are intact") from error


def make_folder(path: Path) -> None:
    """Create the folder ``path`` and its parents. Raise UserError if ``path`` is a file or cannot be created."""
    if path.is_file():
        raise UserError(f"{path} is a file, not a folder")
    with oserror_as_user_error(path):
        path.mkdir(parents=True, exist_ok=True)


def refuse_read_only(run_dir: Path) -> None:
    """Raise UserError if this user may not write into ``run_dir``, before hours of work whose result would be lost."""
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the run folder {run_dir}: it is read-only for this user")


@contextlib.contextmanager
def atomic_write(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` once all of its content is on the disk.

    After a crash at any moment, ``path`` holds either the old content or the new content.

    previous: the name under which the old file is kept. For a moment between the two renames only ``previous`` exists.
    Raises UserError if the disk is full or read-only; ``path`` is unchanged then.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with oserror_as_user_error(path):
        _make_synced(path.parent)
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if previous is not None and path.exists():
                os.replace(path, previous)
            os.replace(partial, path)
            _sync_directory(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write ``content`` to ``path`` as indented JSON with :func:`atomic_write`."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def append(path: Path, text: str) -> None:
    """Append ``text`` to ``path``. A power cut may lose it until :func:`sync`. Raises UserError on a full disk."""
    with oserror_as_user_error(path), open(path, "a") as file:
        file.write(text)


def sync(path: Path) -> None:
    """Wait until the content of ``path`` is on the disk. Raises UserError if the disk refuses."""
    with oserror_as_user_error(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def _make_synced(folder: Path) -> None:
    """Create ``folder`` and its parents so that they survive a power cut."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        _sync_directory(each.parent)


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut. Some network file systems do not support this and do not need it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def exclusive(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock file ``path``; wait while another process holds it.

    The operating system releases the lock when the process ends, whatever ended it. Raises OSError if the file cannot
    be created or its file system has no locks.
    """
    with path.open("a") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                report(f"waiting for another process to finish with {path.with_suffix('')}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training into ``run_dir`` at the same time.

    Raises UserError if another process holds the lock. On a file system without locks it does nothing.
    """
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context((run_dir / ".lock").open("a"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{run_dir} is being trained by another process") from None
        yield
