"""Archives from the network to the disk: continued where they were cut off, checked, and unpacked with care."""

import hashlib
import os
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from ltat_fast.errors import UserError
from ltat_fast.files import exclusive

ATTEMPTS = 4
"""connections in a row that bring no byte before a download is given up"""
PAUSE = 1.0
"""seconds before the second of them; doubled each time"""
TIMEOUT = 30.0
"""seconds of silence after which a connection counts as lost"""
MAX_UNPACKED = 4 * 2**30
"""bytes; an archive that claims to hold more is refused"""

NETWORK_ERRORS = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Archive:
    url: str
    md5: str

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    def by_hand(self, path: Path) -> str:
        return f"download {self.url} to {path} by hand (md5 {self.md5}) and run again"


def fetch(archive: Archive, folder: Path, download: bool, report: Callable[[str], None]) -> Path:
    """The verified file of ``archive`` in ``folder``, downloaded if it is not there.

    Bytes arrive in ``<name>.part``, which a later attempt or a later run continues (HTTP Range). The file gets its name
    when it is complete and its checksum right.

    Raises:
        UserError: the file is damaged or cannot be had; the message has the path, the checksum and what to do by hand.
    """
    path = folder / archive.filename
    try:
        if path.exists():
            _check(archive, path, path)
            return path
        if not download:
            raise UserError(f"{path} is missing; {archive.by_hand(path)}")
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{archive.filename}.lock", report):
            if not path.exists():
                partial = folder / f"{archive.filename}.part"
                _download(archive, path, partial, report)
                _check(archive, partial, path)
                os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot read or write {path}: {error.strerror}; {archive.by_hand(path)}") from error
    return path


def unpack(path: Path, folder: Path, top: str, report: Callable[[str], None]) -> Path:
    """Unpack the zip file ``path``, whose members all lie under ``top``, to ``folder/top``: as a whole or not at all.

    Raises:
        UserError: a damaged file, a folder that cannot be written, or members that lie outside ``top``, are links, or
            claim more than :data:`MAX_UNPACKED` bytes.
    """
    target, partial = folder / top, folder / f".{top}.part"
    try:
        with exclusive(folder / f"{top}.lock", report):
            if target.is_dir():
                return target
            report(f"unpacking {path}")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with zipfile.ZipFile(path) as archive:
                    _refuse_unsafe(path, archive.infolist(), top)
                    archive.extractall(partial)
                if not (partial / top).is_dir():
                    raise UserError(f"{path} is refused: it holds no folder {top}/")
                os.rename(partial / top, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot unpack {path} to {folder}: {error.strerror or error}") from error
    # what a damaged zip file can raise: BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ...
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no sound zip file: {error}") from error
    return target


def _download(archive: Archive, path: Path, partial: Path, report: Callable[[str], None]) -> None:
    failures = 0
    while True:
        size = _size(partial)
        try:
            _continue(archive.url, partial, report)
            return
        except NETWORK_ERRORS as error:
            failures = failures + 1 if _size(partial) <= size else 1
            refused = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if failures == ATTEMPTS or refused:
                raise UserError(f"cannot download {archive.url} ({error}); {archive.by_hand(path)}") from error
            report(f"{error}; trying again")
            time.sleep(PAUSE * 2 ** (failures - 1))


def _continue(url: str, partial: Path, report: Callable[[str], None]) -> None:
    """One connection: append what is missing of ``url`` to ``partial``.

    Raises:
        NETWORK_ERRORS: among them ConnectionError where the connection ends before the file does.
    """
    size = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if size and error.code == 416:  # nothing lies beyond what is there: the checksum decides
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file
            size = 0
        remaining = response.headers.get("Content-Length")
        total = None if remaining is None else size + int(remaining)
        report(f"downloading {url} to {partial}" + (f" from byte {size:,}" if size else ""))
        said = time.monotonic()
        with partial.open("ab" if size else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                size += len(block)
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    report(f"{size / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))
        if total is not None and size < total:
            raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")


def _check(archive: Archive, file: Path, path: Path) -> None:
    """Raise unless ``file``, which is or shall become ``path``, has its checksum; a wrong partial file is deleted."""
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() == archive.md5:
        return
    if file == path:
        raise UserError(
            f"{path} is damaged: md5 {digest.hexdigest()}, expected {archive.md5}; delete it and run again, "
            f"or {archive.by_hand(path)}"
        )
    file.unlink()
    raise UserError(
        f"what {archive.url} sent has md5 {digest.hexdigest()}, expected {archive.md5}; it was deleted: run again, "
        f"or {archive.by_hand(path)}"
    )


def _refuse_unsafe(path: Path, members: list[zipfile.ZipInfo], top: str) -> None:
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if "\\" in member.filename or ".." in parts or parts[:1] != (top,):
            raise UserError(f"{path} is refused: its member {member.filename!r} does not lie in {top}/")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path} is refused: its member {member.filename!r} is a link")
    if (claimed := sum(member.file_size for member in members)) > MAX_UNPACKED:
        raise UserError(f"{path} is refused: it claims to unpack to {claimed:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
