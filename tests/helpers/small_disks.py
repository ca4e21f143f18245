"""A disk that is soon full, or read-only."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own in ``folder``, of ``size`` and no larger; where that is not permitted, a skip."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"this test mounts a small file system, which is not permitted here: {done and done.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change a file system of :func:`file_system`: ``ro``, ``rw``, ``size=64m``."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
