"""Write the files of a report."""

from pathlib import Path

from ltat_fast import files


def write(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` and print its size.

    A regular file is replaced only once all of the text is on the disk. A pipe, a device such as /dev/stdout or a link
    is written to and stays what it is. Raises UserError if ``path`` cannot be written.
    """
    content = text.encode()
    if path.is_symlink() or (path.exists() and not path.is_file()):
        with files.oserror_as_user_error(path):
            path.write_bytes(content)
    else:
        with files.atomic_write(path) as file:
            file.write(content)
    print(f"{path}: {len(content) / 1000:,.0f} kB")
