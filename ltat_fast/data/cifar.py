"""Read CIFAR-10 and CIFAR-100 from their published files.

The files are pickles. They are read as data only: a pickle that asks to import or call anything else is refused.
"""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ltat_fast.errors import UserError

Split = tuple[np.ndarray, np.ndarray]


def read_cifar(published: type, root: Path, fetch_archive: Callable[[], Path]) -> tuple[Split, Split, tuple[str, ...]]:
    """Read the training split, the test split and the class names.

    Args:
        published: torchvision's class of the dataset, for the names and checksums of its files
        root: the folder that may hold the unpacked files
        fetch_archive: returns the path of the verified tar file; called unless the unpacked files are complete and
            have the right checksums

    Returns:
        For each split images uint8 (N, 3, 32, 32) and labels int64 (N,); then the class names.

    Raises:
        UserError: a file that is damaged, or whose arrays are not those of a CIFAR batch.
    """
    meta = published.meta
    train_files, test_files = published.train_list, published.test_list
    checksums = dict([*train_files, *test_files, (meta["filename"], meta["md5"])])
    folder = root / published.base_folder
    contents = _read_folder(folder, checksums)
    if contents is None:
        contents = _read_archive(fetch_archive(), published.base_folder, checksums)
    meta_file = meta["filename"]
    class_names = tuple(load_pickle(contents[meta_file], folder / meta_file).get(meta["key"], ()))

    def read_split(files: list[list[str]]) -> Split:
        batches = [load_batch(contents[name], folder / name, len(class_names)) for name, _ in files]
        images, labels = zip(*batches, strict=True)
        return np.concatenate(images), np.concatenate(labels)

    return read_split(train_files), read_split(test_files), class_names


def load_batch(content: bytes, path: Path, num_classes: int) -> Split:
    """Load the images and labels of one pickled batch.

    Args:
        content: the pickle
        path: names the file in error messages

    Raises:
        UserError: the content is not a CIFAR batch of ``num_classes`` classes.
    """
    entry = load_pickle(content, path)
    rows, labels = entry.get("data"), entry.get("labels", entry.get("fine_labels"))
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
        raise UserError(f"{path} does not hold rows of 3,072 bytes")
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise UserError(f"{path} does not hold one label for each of its {len(rows):,} images")
    wrong = [label for label in labels if type(label) is not int or not 0 <= label < num_classes]
    if wrong:
        raise UserError(f"{path} has the label {wrong[0]!r}, expected an integer in 0..{num_classes - 1}")
    return rows.reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def load_pickle(content: bytes, path: Path) -> dict:
    """Load the dictionary in a pickle of numbers, strings, containers and uint8 arrays.

    Raises:
        UserError: the pickle is damaged or holds anything else; the message names ``path``.
    """
    try:
        entry = _DataUnpickler(io.BytesIO(content), encoding="latin1").load()
        return {key: value.array() if isinstance(value, _PickledArray) else value for key, value in entry.items()}
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path} is not a CIFAR file: {error or type(error).__name__}") from error


class _PickledArray:
    """The state of a pickled array. Replaces NumPy's own reconstruction, which would trust shape and dtype."""

    def __init__(self, *_) -> None:
        self.state = None

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        _, shape, dtype, column_major, data = self.state
        if not isinstance(dtype, _PickledDtype) or dtype.name != "u1":
            raise ValueError("an array that is not uint8")
        data = data.encode("latin1") if isinstance(data, str) else data  # a pickle of Python 2 holds the bytes as text
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if column_major else "C")


class _PickledDtype:
    def __init__(self, name: str, *_) -> None:
        self.name = name

    def __setstate__(self, state: tuple) -> None:
        pass


class _DataUnpickler(pickle.Unpickler):
    """An unpickler that knows arrays, their dtype and bytes, and refuses every other import."""

    def find_class(self, module: str, name: str):
        package = module.partition(".")[0]
        if package == "numpy" and name in ("_reconstruct", "ndarray"):
            return _PickledArray
        if (module, name) == ("numpy", "dtype"):
            return _PickledDtype
        if (module, name) == ("_codecs", "encode"):
            return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not data")


def _read_folder(folder: Path, checksums: dict[str, str]) -> dict[str, bytes] | None:
    """Read the unpacked files; None if one is missing or has another checksum."""
    contents = {}
    for name, md5 in checksums.items():
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError:
            return None
        if _md5(contents[name]) != md5:
            return None
    return contents


def _read_archive(path: Path, folder: str, checksums: dict[str, str]) -> dict[str, bytes]:
    """Read the files from the archive into memory; nothing is unpacked to the disk."""
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
