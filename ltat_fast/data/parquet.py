"""Images in Parquet files, as the Hugging Face hub stores them: ``data/train-*.parquet``, one row per image.

A row has a struct of the encoded file (``bytes``) and a label. The metadata of the file may hold the names of the
classes. pyarrow reads the files; it is an optional dependency. An image is named "FILE:ROW", rows counted from 0.
"""

import bisect
import functools
import io
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ltat_fast.data.folder import Split, Tree
from ltat_fast.errors import UserError

SPLITS = {"train": ("train",), "test": ("test",), "val": ("validation", "valid", "val")}
"""the beginnings of the file names of each split"""


def scan_parquet(root: Path, report: Callable[[str], None] = lambda line: None) -> Tree:
    """Read the labels of ``train-*.parquet``, ``validation-*`` and ``test-*`` in ``root/data``, or in ``root`` itself.

    The validation split is the test split if there is no test split, or if its labels are all -1, which the hub uses
    for hidden labels.

    Raises:
        UserError: pyarrow is missing; there is no file of a split; a file is damaged or has no column of images or
            labels; a label is out of range; a class has no training image.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise UserError("parquet-lt needs pyarrow: pip install pyarrow") from None
    _shard.cache_clear()  # the files may have changed
    folder = root / "data" if (root / "data").is_dir() else root
    files = {
        split: sorted(path for name in names for path in folder.glob(f"{name}-*.parquet"))
        for split, names in SPLITS.items()
    }
    if not files["train"]:
        raise UserError(f"{folder} has no train-*.parquet")
    splits = {name: _labels(found) for name, found in files.items() if found}
    if "test" in splits and set(splits["test"].labels) == {-1}:
        report(f"{folder}: the test split has no labels and is not used")
        del splits["test"]
    if "test" not in splits:
        if "val" not in splits:
            raise UserError(f"{folder} has no test-*.parquet or validation-*.parquet with labels")
        splits["test"] = splits.pop("val")
    names = _Shard(str(files["train"][0])).class_names
    names = names or tuple(map(str, range(max(splits["train"].labels, default=0) + 1)))
    for name, split in splits.items():
        for path, label in zip(split.paths, split.labels, strict=True):
            if not 0 <= label < len(names):
                raise UserError(f"{path}: the label {label} is not in 0..{len(names) - 1}, the classes of the dataset")
        if not split.labels:
            raise UserError(f"{folder}: the {name} split has no image")
    if missing := set(range(len(names))) - set(splits["train"].labels):
        raise UserError(f"{folder}: class {names[min(missing)]!r} has no training image")
    return Tree(root, names, splits["train"], splits["test"], splits.get("val"), open_row, _file_of)


def open_row(path: str | Path) -> BinaryIO:
    """Open the image "FILE:ROW". Each thread keeps the row group that it read last, because rows are read in order.

    Raises ValueError if the row has no image.
    """
    file, _, row = str(path).rpartition(":")
    shard = _shard(file)
    group = bisect.bisect_right(shard.first_rows, int(row)) - 1
    if getattr(_last, "key", None) != (shard, group):
        with _lock:  # a ParquetFile is not made for several threads
            column = shard.parquet.read_row_group(group, columns=[shard.image_column]).column(0)
        _last.key, _last.rows = (shard, group), column
    value = _last.rows[int(row) - shard.first_rows[group]].as_py()
    content = value.get("bytes") if isinstance(value, dict) else value
    if content is None:
        raise ValueError("the row has no image bytes")
    return io.BytesIO(content)


class _Shard:
    """One Parquet file: its columns, its row groups, and the names of the classes if its metadata has them."""

    def __init__(self, file: str) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        try:
            self.parquet = parquet.ParquetFile(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        schema = self.parquet.schema_arrow
        self.image_column = _only(file, "images", [f.name for f in schema if _holds_images(f.type)], ("image", "img"))
        integers = [f.name for f in schema if pa.types.is_integer(f.type)]
        self.label_column = _only(file, "labels", integers, ("label", "labels"))
        self.class_names = _class_names(schema.metadata or {}, self.label_column)
        groups = [self.parquet.metadata.row_group(i).num_rows for i in range(self.parquet.num_row_groups)]
        self.first_rows = [0, *itertools.accumulate(groups)][:-1]


_last = threading.local()
_lock = threading.Lock()
_shard = functools.lru_cache(maxsize=64)(_Shard)


def _labels(files: list[Path]) -> Split:
    """Read the labels of all rows of ``files``."""
    import pyarrow as pa

    paths, labels = [], []
    for file in map(str, files):
        shard = _Shard(file)
        try:
            column = shard.parquet.read(columns=[shard.label_column]).column(0)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        if column.null_count:
            raise UserError(f"{file}: {column.null_count:,} rows have no label")
        labels += np.asarray(column).tolist()
        paths += [f"{file}:{row}" for row in range(len(column))]
    return Split(paths, labels)


def _only(file: str, what: str, found: list[str], preferred: tuple[str, ...]) -> str:
    """Return the column of ``preferred`` that was found, or the only one that was. Raises UserError."""
    if chosen := next((name for name in preferred if name in found), None):
        return chosen
    if len(found) != 1:
        raise UserError(f"{file} has {len(found)} columns that can be the {what}; name the right one {preferred[0]!r}")
    return found[0]


def _holds_images(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_binary(kind) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)


def _class_names(metadata: dict[bytes, bytes], column: str) -> tuple[str, ...]:
    """Return the names in the metadata that the library datasets writes; empty if there are none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _file_of(path: str) -> str:
    return path.rpartition(":")[0]
