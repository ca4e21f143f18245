"""What a power cut leaves of a folder: the names and contents that were synced before it.

An fsync of a file makes its content survive, an fsync of a folder the names in it. Two disks are modelled. The strict
one loses everything else. The journalling one keeps all names, as most file systems do, and loses contents.
"""

import os
from pathlib import Path

Image = dict[str, bytes]
"""contents by path, relative to the folder"""


class PowerCuts:
    """Collects the different images that cuts before and after each sync and each rename in ``root`` would leave.

    With ``patched``, a pytest.MonkeyPatch, it wraps os.fsync and os.replace.
    """

    def __init__(self, root: Path, patched):
        self.root, self.images = root, []
        self.contents: dict[int, bytes] = {}  # synced, by inode
        self.names: dict[Path, dict[str, int | None]] = {root: {}}  # synced: inode by name, None for a folder
        self.held: list[int] = []  # open descriptors, so that the number of an inode is not used again
        fsync, replace = os.fsync, os.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self._synced(descriptor)

        def replaced(source, target) -> None:
            self._cut()
            replace(source, target)
            self._cut()

        patched.setattr(os, "fsync", synced)
        patched.setattr(os, "replace", replaced)

    def _synced(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._cut()
        if path.is_dir():
            inside = list(os.scandir(path))
            self.names[path] = {entry.name: None if entry.is_dir() else entry.inode() for entry in inside}
        else:
            self.contents[os.fstat(descriptor).st_ino] = path.read_bytes()
            self.held.append(os.dup(descriptor))
        self._cut()

    def _cut(self) -> None:
        for image in (self._strict(self.root), self._journalling()):
            read_again = {name: content for name, content in image.items() if not name.endswith(".partial")}
            if read_again not in self.images:
                self.images.append(read_again)

    def _strict(self, folder: Path) -> Image:
        found = {}
        for name, inode in self.names.get(folder, {}).items():
            if inode is None:
                found |= self._strict(folder / name)
            else:
                found[str((folder / name).relative_to(self.root))] = self.contents.get(inode, b"")
        return found

    def _journalling(self) -> Image:
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.root)): self.contents.get(path.stat().st_ino, b"") for path in files}

    def close(self) -> None:
        for descriptor in self.held:
            os.close(descriptor)


def write(image: Image, root: Path) -> Path:
    """Write ``image`` into the new folder ``root``."""
    root.mkdir()
    for name, content in image.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root
