"""Small file systems that can be full or read-only."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def file_system(folder: Path, size: str) -> Iterator[Path]:
    """Mount a new file system of ``size`` on ``folder``. Skip the test if this is not permitted."""
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
    """Change a file system of :func:`file_system`. options: ``ro``, ``rw`` or ``size=64m``."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)
