"""Download archives (resumed after an interruption), verify their checksum, and unpack them safely."""

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
"""a download fails after this number of connections in a row without a single new byte"""
PAUSE = 1.0
"""seconds to wait after the first such connection; doubled after each further one"""
TIMEOUT = 30.0
"""seconds without data after which a connection counts as lost"""
MAX_UNPACKED = 4 * 2**30
"""limit on the unpacked size of an archive, in bytes"""

NETWORK_ERRORS = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Archive:
    """A file to download, and its MD5 checksum in hex digits."""

    url: str
    md5: str

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    def by_hand(self, path: Path) -> str:
        """Return the instruction to download the archive manually, for error messages."""
        return f"download {self.url} to {path} by hand (md5 {self.md5}) and run again"


def fetch(archive: Archive, folder: Path, download: bool, report: Callable[[str], None]) -> Path:
    """Return the path of the verified ``archive`` in ``folder``; download the archive first if it is missing.

    The download goes to ``<name>.part``. A later attempt or a later run resumes it (HTTP Range). The file is renamed
    when it is complete and its checksum is right.

    Args:
        download: whether to download a missing archive; if not, it is an error
        report: called with each line for the user

    Raises:
        UserError: the file is damaged or not available; the message gives path, checksum and manual instructions.
    """
    path = folder / archive.filename
    try:
        if path.exists():
            if (md5 := _md5(path)) != archive.md5:
                raise UserError(
                    f"{path} is damaged: md5 {md5}, expected {archive.md5}; delete it and run again, "
                    f"or {archive.by_hand(path)}"
                )
            return path
        if not download:
            raise UserError(f"{path} is missing; name its folder with --data-dir, or {archive.by_hand(path)}")
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{archive.filename}.lock", report):
            if not path.exists():
                partial = folder / f"{archive.filename}.part"
                _download(archive, path, partial, report)
                if (md5 := _md5(partial)) != archive.md5:
                    partial.unlink()
                    raise UserError(
                        f"the download of {archive.url} has md5 {md5}, expected {archive.md5}, and was deleted; "
                        f"run again, or {archive.by_hand(path)}"
                    )
                os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot read or write {path}: {error.strerror}; {archive.by_hand(path)}") from error
    return path


def unpack(path: Path, folder: Path, top: str, report: Callable[[str], None]) -> Path:
    """Unpack the zip file ``path`` to ``folder/top``, completely or not at all, and return that folder.

    Args:
        top: the folder in the archive that must hold all of its members
        report: called with each line for the user

    Raises:
        UserError: the file is damaged, the folder is not writable, or a member lies outside ``top`` or is a link, or
            the members claim more than :data:`MAX_UNPACKED` bytes.
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
                    raise UserError(f"{path} is refused: it does not hold the folder {top}/")
                os.rename(partial / top, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot unpack {path} to {folder}: {error.strerror or error}") from error
    except UserError:
        raise
    # A damaged zip file can raise BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ...
    except Exception as error:
        raise UserError(f"{path} is not a valid zip file: {error}") from error
    return target


def _download(archive: Archive, path: Path, partial: Path, report: Callable[[str], None]) -> None:
    """Download ``archive`` to ``partial``, reconnecting after network errors; ``path`` is for the error message."""
    failures = 0
    while True:
        size = _size(partial)
        try:
            _resume(archive.url, partial, report)
            return
        except NETWORK_ERRORS as error:
            failures = failures + 1 if _size(partial) <= size else 1
            client_error = isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500
            if failures == ATTEMPTS or client_error:
                raise UserError(f"cannot download {archive.url} ({error}); {archive.by_hand(path)}") from error
            report(f"{error}; trying again")
            time.sleep(PAUSE * 2 ** (failures - 1))


def _resume(url: str, partial: Path, report: Callable[[str], None]) -> None:
    """Open one connection and append the missing bytes of ``url`` to ``partial``.

    Raises:
        NETWORK_ERRORS: among them ConnectionError if the connection ends before the end of the file.
    """
    size = _size(partial)
    request = urllib.request.Request(url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if size and error.code == 416:  # "Range Not Satisfiable": all bytes are here; the caller checks the checksum
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file
            size = 0
        remaining = response.headers.get("Content-Length")
        total = None if remaining is None else size + int(remaining)
        report(f"downloading {url} to {partial}" + (f" from byte {size:,}" if size else ""))
        last_report = time.monotonic()
        with partial.open("ab" if size else "wb") as file:
            while block := response.read(1 << 20):
                file.write(block)
                size += len(block)
                if time.monotonic() - last_report > 10:
                    last_report = time.monotonic()
                    report(f"{size / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))
        if total is not None and size < total:
            raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")


def _md5(file: Path) -> str:
    """Return the MD5 checksum of a file in hex digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _refuse_unsafe(path: Path, members: list[zipfile.ZipInfo], top: str) -> None:
    """Raise UserError for a member outside ``top``, a link, or too many bytes."""
    for member in members:
        parts = PurePosixPath(member.filename).parts
        if "\\" in member.filename or ".." in parts or parts[:1] != (top,):
            raise UserError(f"{path} is refused: its member {member.filename!r} is not in {top}/")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise UserError(f"{path} is refused: its member {member.filename!r} is a link")
    if (claimed := sum(member.file_size for member in members)) > MAX_UNPACKED:
        raise UserError(f"{path} is refused: it claims to unpack to {claimed:,} bytes, the limit is {MAX_UNPACKED:,}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
