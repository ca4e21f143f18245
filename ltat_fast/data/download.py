"""Download archives (resumed after an interruption), verify their checksum, and unpack them safely."""

import hashlib
import os
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath

from ltat_fast.errors import UserError, printable
from ltat_fast.files import exclusive

ATTEMPTS = 4
"""a download fails after this number of connections in a row without a single new byte"""
PAUSE = 1.0
"""seconds to wait after the first such connection; doubled after each further one"""
TIMEOUT = 30.0
"""seconds without data after which a connection counts as lost"""
LONGEST_PAUSE = 60.0
"""seconds to wait at most if the server asks for a pause"""
ASK_AGAIN = (408, 425, 429)
"""status codes of the client's side that pass: timeout, too early, too many requests"""
REASON = 200
"""characters of an answer of the server that a message shows"""
MAX_DOWNLOAD = 4 * 2**30
"""limit on a file whose size nobody says, in bytes"""
MAX_UNPACKED = 4 * 2**30
"""limit on the unpacked size of an archive, in bytes"""

NETWORK_ERRORS = (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@dataclass(frozen=True)
class Archive:
    """A file to download, its checksums in hex digits, and its size in bytes, as far as they are known."""

    url: str
    md5: str
    sha256: str | None = None
    size: int | None = None

    @property
    def filename(self) -> str:
        return self.url.rpartition("/")[2]

    def by_hand(self, path: Path) -> str:
        """Return the instruction to download the archive manually, for error messages."""
        return f"download {self.url} to {path} by hand (md5 {self.md5}) and run again"


def fetch(archive: Archive, folder: Path, download: bool, report: Callable[[str], None]) -> Path:
    """Return the path of the verified ``archive`` in ``folder``; download the archive first if it is missing.

    The download goes to ``<name>.part``. A later attempt or a later run resumes it (HTTP Range). The file is renamed
    when it is complete and its checksums are right.

    Args:
        download: whether to download a missing archive; if not, it is an error
        report: called with each line for the user

    Raises:
        UserError: the file is damaged or not available; the message gives path, checksum and manual instructions.
    """
    path = folder / archive.filename
    try:
        if path.exists():
            if wrong := _wrong_checksum(archive, path):
                raise UserError(f"{path} is damaged: {wrong}; delete it and run again, or {archive.by_hand(path)}")
            return path
        if not download:
            raise UserError(f"{path} is missing; name its folder with --data-dir, or {archive.by_hand(path)}")
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / f"{archive.filename}.lock", report):
            if not path.exists():
                partial = folder / f"{archive.filename}.part"
                _download(archive, path, partial, report)
                if wrong := _wrong_checksum(archive, partial):
                    partial.unlink()
                    raise UserError(
                        f"the download of {archive.url} has {wrong}, and was deleted; "
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


class _WrongAnswer(Exception):
    """The server answered with something else than the missing bytes. Trying again would not help."""


def _download(archive: Archive, path: Path, partial: Path, report: Callable[[str], None]) -> None:
    """Download ``archive`` to ``partial``, reconnecting after network errors; ``path`` is for the error message.

    What was received stays in ``partial``, whatever the server sends later.
    """
    failures = 0
    while True:
        size = _size(partial)
        try:
            _resume(archive, partial, report)
            return
        except _WrongAnswer as error:
            kept = f"; {partial} is kept, delete it to start over" if size else ""
            raise UserError(f"cannot download {archive.url}: {error}{kept}; {archive.by_hand(path)}") from None
        except NETWORK_ERRORS as error:
            failures = failures + 1 if _size(partial) <= size else 1
            reason = printable(str(error))[:REASON]
            if failures == ATTEMPTS or _is_final(error):
                raise UserError(f"cannot download {archive.url} ({reason}); {archive.by_hand(path)}") from error
            report(f"{reason}; trying again")
            time.sleep(max(PAUSE * 2 ** (failures - 1), _asked_pause(error)))


def _is_final(error: Exception) -> bool:
    """Whether the server says that asking again is useless."""
    return isinstance(error, urllib.error.HTTPError) and 400 <= error.code < 500 and error.code not in ASK_AGAIN


def _asked_pause(error: Exception) -> float:
    """Return the seconds that the server asks to wait, at most :data:`LONGEST_PAUSE`; 0 if it does not ask."""
    asked = error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    return min(_number(asked) or 0, LONGEST_PAUSE)


def _resume(archive: Archive, partial: Path, report: Callable[[str], None]) -> None:
    """Open one connection and append the missing bytes of ``archive`` to ``partial``.

    Raises:
        NETWORK_ERRORS: among them ConnectionError if the connection ends before the end of the file.
        _WrongAnswer: the server sent another file.
    """
    size = _size(partial)
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={size}-"} if size else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if size and error.code == 416:  # "Range Not Satisfiable": all bytes are here; the caller checks the checksum
            return
        raise
    with response, partial.open("a+b") as file:
        total = _expected_size(archive, response, size)
        limit = total or MAX_DOWNLOAD
        report(f"downloading {archive.url} to {partial}" + (f" from byte {size:,}" if size else ""))
        again = response.status == 206  # otherwise the server sends the whole file, from its first byte
        received, last_report = size if again else 0, time.monotonic()
        while block := response.read1(1 << 20):  # read() would lose up to this many bytes if the connection breaks
            if received + len(block) > limit:
                raise _WrongAnswer(f"the server sends more than the {limit:,} bytes of the file")
            known = min(len(block), max(0, size - received))
            file.seek(received)
            if file.read(known) != block[:known]:
                raise _WrongAnswer("the server sends another file than before")
            file.write(block[known:])  # a file opened with "a" is written at its end
            received += len(block)
            if time.monotonic() - last_report > 10:
                last_report = time.monotonic()
                report(f"{received / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f} MB" if total else ""))
    if total is not None and received < total:
        raise ConnectionError(f"the connection ended after {received:,} of {total:,} bytes")


def _expected_size(archive: Archive, response: HTTPResponse, size: int) -> int | None:
    """Return the size of the whole file, None if nobody says it. ``size`` bytes of it are here.

    Raises _WrongAnswer if the headers say that this is not the rest of the file.
    """
    kind = response.headers.get_content_type() if "Content-Type" in response.headers else ""
    if kind == "text/html":
        raise _WrongAnswer("the server sends a web page, perhaps a login page, instead of the file")
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status == 206 and first and int(first[1]) != size:
        raise _WrongAnswer(f"the server sends the file from another byte than {size:,}")
    rest = _number(response.headers.get("Content-Length", ""))
    total = None if rest is None else rest + (size if response.status == 206 else 0)
    if archive.size is not None and total not in (None, archive.size):
        raise _WrongAnswer(f"the server sends {total:,} bytes, and the file has {archive.size:,}")
    return archive.size if total is None else total


def _number(text: str) -> int | None:
    """Return the number in a header, None if it is no number."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def _wrong_checksum(archive: Archive, file: Path) -> str | None:
    """Return which checksum of ``file`` is not that of ``archive``, as "md5 ..., expected ..."; None if all are."""
    wanted = {"md5": archive.md5} | ({"sha256": archive.sha256} if archive.sha256 else {})
    digests = {name: hashlib.new(name, usedforsecurity=False) for name in wanted}
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            for digest in digests.values():
                digest.update(block)
    for name, digest in digests.items():
        if digest.hexdigest() != wanted[name]:
            return f"{name} {digest.hexdigest()}, expected {wanted[name]}"
    return None


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
