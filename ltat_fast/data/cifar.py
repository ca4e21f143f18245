"""CIFAR-10 and CIFAR-100 from their published files, which are pickles: read as data, nothing in them is run."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ltat_fast.errors import UserError

Part = tuple[np.ndarray, np.ndarray]


def read_cifar(published: type, root: Path, archive: Callable[[], Path]) -> tuple[Part, Part, tuple[str, ...]]:
    """Images uint8 (N, 3, 32, 32) and labels int64 (N,) to train on and to test on, and the names of the classes.

    Args:
        published: torchvision's class of the dataset, for the names and checksums of its files
        root: holds the unpacked folder, or whatever ``archive`` needs
        archive: gives the verified tar file; called unless the folder is there, whole and unchanged

    Raises:
        UserError: a file that is damaged, or whose arrays are not those of a CIFAR batch.
    """
    meta = published.meta
    lists = published.train_list, published.test_list
    checksums = dict([*lists[0], *lists[1], (meta["filename"], meta["md5"])])
    folder = root / published.base_folder
    contents = _unpacked(folder, checksums) or _packed(archive(), published.base_folder, checksums)
    names = tuple(load(contents[meta["filename"]], folder / meta["filename"]).get(meta["key"], ()))

    def part(files: list[list[str]]) -> Part:
        images, labels = zip(*(batch(contents[f], folder / f, len(names)) for f, _ in files), strict=True)
        return np.concatenate(images), np.concatenate(labels)

    return part(lists[0]), part(lists[1]), names


def batch(content: bytes, path: Path, classes: int) -> Part:
    """The images and labels of one pickled batch; ``path`` is what an error calls it."""
    entry = load(content, path)
    rows, labels = entry.get("data"), entry.get("labels", entry.get("fine_labels"))
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
        raise UserError(f"{path} holds no rows of 3,072 bytes")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise UserError(f"{path} does not hold one label for each of its {len(rows):,} images")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < classes]
    if wrong:
        raise UserError(f"{path} has the label {wrong[0]!r}, which is none of its {classes} classes")
    return rows.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def load(content: bytes, path: Path) -> dict:
    """The dictionary in a pickle of numbers, strings, containers and uint8 arrays. Raises UserError for any other."""
    try:
        entry = _Plain(io.BytesIO(content), encoding="latin1").load()
        return {key: value.array() if isinstance(value, _Array) else value for key, value in entry.items()}
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise UserError(f"{path} is not a CIFAR file: {error or type(error).__name__}") from error


class _Array:
    """What a pickle says of an array. Stands in for NumPy's own, which would trust the shape and the dtype."""

    def __init__(self, *_) -> None:
        self.state = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, column_major, data = self.state
        if not isinstance(dtype, _Dtype) or dtype.name != "u1":
            raise ValueError("an array that is not uint8")
        data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote it
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


class _Dtype:
    def __init__(self, name: str, *_) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


class _Plain(pickle.Unpickler):
    """Knows an array, its dtype and bytes; whatever else a pickle asks to import, to call it, is refused."""

    def find_class(self, module: str, name: str):
        package = module.partition(".")[0]
        if package == "numpy" and name in ("_reconstruct", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")


def _unpacked(folder: Path, checksums: dict[str, str]) -> dict[str, bytes] | None:
    contents = {}
    for name, md5 in checksums.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError:
            return None
        if _md5(contents[name]) != md5:
            return None
    return contents


def _packed(path: Path, folder: str, checksums: dict[str, str]) -> dict[str, bytes]:
    """The files as they are in the archive, which is read from front to back and not unpacked."""
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                parent, _, name = member.name.rpartition("/")
                if parent == folder and name in checksums and member.isreg():
                    contents[name] = archive.extractfile(member).read()
    except Exception as error:  # tarfile.TarError, zlib.error, EOFError, OSError, ...
        raise UserError(f"cannot unpack {path}: {error}") from error
    for name, md5 in checksums.items():
        if name not in contents:
            raise UserError(f"{path} does not hold {folder}/{name}")
        if _md5(contents[name]) != md5:
            raise UserError(f"{path} holds a damaged {folder}/{name}: md5 {_md5(contents[name])}, expected {md5}")
    return contents


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
