"""Read list files of images: one line "relative/path label" per image, as ImageNet-LT and Places-LT are published.

The splits and classes of these benchmarks are those of Liu et al., "Large-Scale Long-Tailed Recognition in an Open
World", CVPR 2019. Nothing is decoded here.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from ltat_fast.data.folder import Split, Tree
from ltat_fast.errors import UserError


def scan_image_lists(root: Path, report: Callable[[str], None] = lambda line: None) -> Tree:
    """Read ``train.txt``, ``val.txt`` and ``test.txt`` in ``root``.

    ``val.txt`` is the test split if there is no test list. A list may have a longer name that ends in ``_train.txt``,
    ``_val.txt`` or ``_test.txt``, such as ``ImageNet_LT_train.txt``. The labels are 0 to C - 1, and their numbers are
    the names of the classes. The images need not exist for this function.

    Raises:
        UserError: a list is missing, empty or not text; a line has no label; a label is no number or out of range; a
            class has no training image; there are fewer than two classes.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder (expected train.txt, and val.txt or test.txt, in it)")
    files = {split: _list_file(root, split) for split in ("train", "val", "test")}
    train_file, test_file = files["train"], files["test"] or files["val"]
    if train_file is None or test_file is None:
        missing = "train.txt" if train_file is None else "test.txt or val.txt"
        raise UserError(f"{root} has no {missing} with lines of 'relative/path label'")
    train = _read_list(root, train_file)
    num_classes = max(train.labels) + 1
    seen = set(train.labels)
    if len(seen) < num_classes:
        empty = next(c for c in range(num_classes) if c not in seen)
        raise UserError(f"{train_file}: class {empty} has no training image, but the labels go up to {num_classes - 1}")
    if num_classes < 2:
        raise UserError(f"{train_file} has one class; at least two are needed")
    test = _read_list(root, test_file, num_classes)
    val = _read_list(root, files["val"], num_classes) if files["test"] and files["val"] else None
    report(f"image lists: {', '.join(file.name for file in files.values() if file)} in {root}")
    return Tree(root, tuple(map(str, range(num_classes))), train, test, val)


def _list_file(root: Path, split: str) -> Path | None:
    """Return the list of ``split``, None if there is none. Raises UserError for two lists with longer names."""
    if (plain := root / f"{split}.txt").exists():
        return plain
    found = sorted(root.glob(f"*_{split}.txt"))
    if len(found) > 1:
        raise UserError(f"{root} has two lists of the {split} images, {found[0].name} and {found[1].name}: keep one")
    return found[0] if found else None


def _read_list(root: Path, file: Path, num_classes: int | None = None) -> Split:
    """Read one list. num_classes: the number of classes of the training list; None while that list is read."""
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    paths, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        path, label = _parse(line, f"{file}, line {number}")
        if label < 0 or (num_classes is not None and label >= num_classes):
            allowed = (
                "0 or more" if num_classes is None else f"in 0..{num_classes - 1}, the labels of the training list"
            )
            raise UserError(f"{file}, line {number}: the label {label} is not {allowed}")
        paths.append(os.path.join(root, path))
        labels.append(label)
    if not paths:
        raise UserError(f"{file} lists no image")
    return Split(paths, labels)


def _parse(line: str, where: str) -> tuple[str, int]:
    """Split a line into path and label. The path may contain spaces. Raises UserError, which begins with ``where``."""
    parts = line.strip().rsplit(None, 1)
    if len(parts) < 2 or "\0" in line:
        raise UserError(f'{where}: {line.strip()[:200]!a} is not "relative/path label"')
    if not re.fullmatch("-?[0-9]{1,18}", parts[1]):  # int() would take 1_0 too
        raise UserError(f"{where}: the label {parts[1][:200]!a} is not a whole number")
    return parts[0], int(parts[1])
