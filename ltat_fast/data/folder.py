"""Scan trees of image files for the class and split of each file. Nothing is decoded here."""

import os
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ltat_fast.data.decode import EXTENSIONS, OpenImage, open_file
from ltat_fast.errors import UserError

TINY_CLASSES = 200


@dataclass(frozen=True)
class Split:
    """The image files of one split and their labels."""

    paths: list[str]  # not Path objects: creating a hundred thousand of them takes a second
    labels: list[int]


@dataclass(frozen=True)
class Tree:
    """The image files of a dataset; a label is a position in ``class_names``."""

    root: Path
    class_names: tuple[str, ...]
    train: Split
    test: Split
    val: Split | None = None
    """images that select the best epoch, if the dataset has them beside its test images"""
    open_image: OpenImage = open_file
    """opens an image of the tree by its path"""
    file_of: Callable[[str], str] = lambda path: path
    """returns the file on the disk that holds the image of this path"""

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that the tree has, by name."""
        return {"train": self.train, "test": self.test} | ({} if self.val is None else {"val": self.val})


def scan_image_folder(root: Path, report: Callable[[str], None] = lambda line: None) -> Tree:
    """Scan ``train/<class>/**`` and ``test/<class>/**``, classes sorted by name.

    ``val/<class>/**`` is the test split if there is no ``test/``. Beside ``test/`` it is a split of its own, which may
    lack classes.

    Files without an image extension are skipped and reported. Hidden files are skipped silently. Folders below a class
    folder are searched too, links to folders below it are not followed.

    Raises:
        UserError: a split is missing or not readable; there are fewer than two classes; the splits have different
            classes; two class names differ only in case; a class name is not printable text; a class has no image.
    """
    train_root = root / "train"
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), root / "test")
    for split in (train_root, test_root):
        if not split.is_dir():
            raise UserError(
                f"{root} is not an image folder: {split} is missing (expected train/<class>/* and test/<class>/*)"
            )
    folders = {split: _class_folders(split) for split in (train_root, test_root)}
    for split, other in ((train_root, test_root), (test_root, train_root)):
        if unmatched := sorted(folders[split].keys() - folders[other].keys()):
            raise UserError(f"class {unmatched[0]!r} is in {split} but not in {other}")
    names = tuple(sorted(folders[train_root]))
    if len(names) < 2:
        raise UserError(f"{train_root} holds {len(names)} class folders; at least two are needed")
    train, test = (_split(split, [folders[split][name] for name in names], report) for split in (train_root, test_root))
    val = None
    if (val_root := root / "val") != test_root and val_root.is_dir():
        in_val = _class_folders(val_root)
        if unmatched := sorted(in_val.keys() - folders[train_root].keys()):
            raise UserError(f"class {unmatched[0]!r} is in {val_root} but not in {train_root}")
        if in_val:
            val = _split(val_root, [in_val.get(name) for name in names], report)
    return Tree(root, names, train, test, val)


def scan_tiny_imagenet(root: Path, report: Callable[[str], None] = lambda line: None) -> Tree:
    """Scan the official tree: ``train/<wnid>/images/*``, ``val/images/*``, ``val/val_annotations.txt``, ``wnids.txt``.

    Labels are positions in the sorted WordNet ids. The validation images are the test set, because the official test
    images have no labels. A ``wnids.txt`` that differs from the folders is reported and not used.

    Raises:
        UserError: a part is missing, there are not 200 classes, or images and annotations do not match.
    """
    names = tuple(sorted(_class_folders(root / "train")))
    if len(names) != TINY_CLASSES:
        raise UserError(f"{root / 'train'} holds {len(names)} class folders; Tiny-ImageNet has {TINY_CLASSES}")
    listed = set(_read_lines(root / "wnids.txt"))
    if listed != set(names):  # some copies of the dataset have a shortened list
        report(f"{root / 'wnids.txt'} lists {len(listed)} classes; using the {TINY_CLASSES} folders of train/ instead")
    label_of = {name: label for label, name in enumerate(names)}
    annotations = root / "val" / "val_annotations.txt"
    test: dict[str, int] = {}
    for line in _read_lines(annotations):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in label_of:
            raise UserError(f"{annotations} gives {file} the class {wnid!r}, which has no folder in train/")
        if file in test:
            raise UserError(f"{annotations} names {file} twice")
        test[file] = label_of[wnid]
    images, _ = _image_files(root / "val" / "images")
    found = [os.path.basename(path) for path in images]
    if unmatched := sorted(set(found) ^ test.keys()):
        raise UserError(f"{annotations} and {root / 'val' / 'images'} do not match, first at {unmatched[0]}")
    if len(found) > len(test):
        raise UserError(f"{root / 'val' / 'images'} holds {len(found) - len(test)} files with duplicate names")
    if missing := set(label_of.values()) - set(test.values()):
        raise UserError(f"{annotations} names no image of class {names[min(missing)]}")
    train = _split(root / "train", [root / "train" / name / "images" for name in names], report)
    return Tree(root, names, train, Split(images, [test[name] for name in found]))


def _split(root: Path, folders: Sequence[Path | None], report: Callable[[str], None]) -> Split:
    """Collect the images of each class folder, labelled by its position in the list. None: the class has no folder."""
    paths, labels, skipped = [], [], []
    for label, folder in enumerate(folders):
        if folder is None:
            continue
        images, others = _image_files(folder)
        if not images:
            raise UserError(f"class folder {folder} does not hold an image")
        paths += images
        labels += [label] * len(images)
        skipped += others
    if skipped:
        example = skipped[0].encode(errors="backslashreplace").decode()
        report(f"{root}: skipped {len(skipped):,} files that are not images, such as {example}")
    return Split(paths, labels)


def _class_folders(root: Path) -> dict[str, Path]:
    """Map class names to folders. Names are in Unicode form NFC, because some file systems return form NFD."""
    if not root.is_dir():
        raise UserError(f"{root} is missing")
    folders: dict[str, Path] = {}
    by_casefolded_name: dict[str, Path] = {}
    for path in sorted(Path(entry.path) for entry in _entries(root)):
        if path.is_dir() and not path.name.startswith("."):
            name = unicodedata.normalize("NFC", path.name)
            if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):  # Cs: bytes that are not UTF-8
                raise UserError(f"class folder {path.name!a} in {root} cannot be shown as text; rename it")
            other = by_casefolded_name.setdefault(name.casefold(), path)
            if other is not path:
                raise UserError(f"class folders {other} and {path} differ only in case or Unicode form; rename one")
            folders[name] = path
    return folders


def _image_files(folder: Path) -> tuple[list[str], list[str]]:
    """Return the images and the other visible files below ``folder``, each sorted by path."""
    images, others, folders = [], [], [os.fspath(folder)]
    while folders:
        for entry in _entries(folders.pop()):
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif not (entry.is_symlink() and os.path.isdir(entry.path)):
                extension = os.path.splitext(entry.name)[1].lower()
                (images if extension in EXTENSIONS else others).append(entry.path)
    return sorted(images), sorted(others)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
