"""Files that are whole or not there, whatever kills the process that writes them or fills the disk."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ltat_fast.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses inside, such as to write to a full disk, becomes a UserError about ``path``."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; what was saved before it is kept") from error


def make_folder(path: Path) -> None:
    """``mkdir --parents``. Raises UserError where ``path`` is a file or the system refuses."""
    if path.is_file():
        raise UserError(f"{path} is a file, not a folder")
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def refuse_read_only(run_dir: Path) -> None:
    """Raises UserError if this user may not write into the folder: before hours of work whose result would be lost."""
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into the run folder {run_dir}: it is read-only for this user")


@contextlib.contextmanager
def whole(path: Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the name ``path`` once all of it is on the disk, directory entry included.

    previous: the name that the file called ``path`` until now is given. In between there is no ``path`` for a moment,
    and ``previous`` is the newest. Raises UserError where the disk is full or read-only; ``path`` then is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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


def _sync_directory(directory: Path) -> None:
    """Without this a rename may not outlive a power cut. Some network file systems cannot, and need not."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
