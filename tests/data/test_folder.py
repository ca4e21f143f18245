"""The class of each file in valid and invalid image trees."""

import os
import shutil
import subprocess
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from helpers.image_trees import write_folder, write_image, write_tiny_imagenet
from ltat_fast.data import load_dataset
from ltat_fast.data.folder import scan_image_folder, scan_tiny_imagenet
from ltat_fast.errors import UserError

COUNTS = {"zebra": (2, 1), "ape": (5, 2), "Émile": (3, 1)}


@pytest.mark.parametrize("test", ["test", "val"])
def test_image_folder(tmp_path, test):
    root = write_folder(tmp_path / "tree", COUNTS, test=test)
    dataset = load_dataset("imagefolder-lt", root, report=lambda line: None)
    assert dataset.train.class_names == ("ape", "zebra", "Émile")
    assert dataset.train.labels.tolist() == [0] * 5 + [1] * 2 + [2] * 3
    assert dataset.train.images[:, 0, 0, 0].tolist() == [2, 3, 4, 5, 6, 0, 1, 7, 8, 9]
    assert dataset.test.labels.tolist() == [0, 0, 1, 2]
    assert dataset.test.images[:, 2, 3, 3].tolist() == [1, 2, 0, 3]
    assert dataset.train.images.dtype == np.uint8
    assert (dataset.n_max, dataset.pad, dataset.flip) == (None, 4, True)


def test_the_test_folder_has_priority_over_val(tmp_path):
    root = write_folder(tmp_path, COUNTS)
    write_folder(tmp_path, dict.fromkeys(COUNTS, (0, 3)), test="val")
    assert len(scan_image_folder(root).test.paths) == 4


def test_other_files_are_skipped_and_reported(tmp_path):
    root = write_folder(tmp_path, COUNTS)
    (root / "train" / "ape" / "notes.txt").write_text("x")
    (root / "train" / "ape" / ".hidden.png").write_text("x")
    (root / "train" / ".git").mkdir()
    (root / "train" / "README").write_text("x")
    write_image(root / "train" / "ape" / "deeper" / "still" / "9.PNG", 9)
    (root / "train" / "ape" / "loop").symlink_to(root / "train" / "ape", target_is_directory=True)
    lines = []
    tree = scan_image_folder(root, lines.append)
    assert len(tree.train.paths) == 11
    assert tree.train.paths[5].endswith("ape/deeper/still/9.PNG")
    assert len(lines) == 1
    assert "skipped 1 files" in lines[0]
    assert "notes.txt" in lines[0]


def test_a_class_folder_may_be_a_link(tmp_path):
    root = write_folder(tmp_path / "tree", COUNTS)
    (root / "train" / "ape").rename(tmp_path / "elsewhere")
    (root / "train" / "ape").symlink_to(tmp_path / "elsewhere")
    assert len(scan_image_folder(root).train.paths) == 10


def test_decomposed_and_composed_names_are_one_class(tmp_path):
    root = write_folder(tmp_path, COUNTS)
    (root / "test" / "Émile").rename(root / "test" / unicodedata.normalize("NFD", "Émile"))
    assert scan_image_folder(root).class_names == ("ape", "zebra", "Émile")


def broken_folder(root, how):
    match how:
        case "no train":
            shutil.rmtree(root / "train")
        case "no test":
            shutil.rmtree(root / "test")
        case "empty class":
            (root / "train" / "zebra" / "0.png").unlink()
            (root / "train" / "zebra" / "1.png").unlink()
        case "empty test class":
            (root / "test" / "zebra" / "0.png").rename(root / "test" / "zebra" / "notes.txt")
        case "class name that is not text":
            for split in ("train", "test"):
                write_image(Path(os.fsdecode(os.fsencode(root / split) + b"/\xff\xfe/0.png")), 0)
        case "class name of two lines":
            for split in ("train", "test"):
                write_image(root / split / "ape\nzebra" / "0.png", 0)
        case "class missing in test":
            shutil.rmtree(root / "test" / "ape")
        case "class missing in train":
            shutil.rmtree(root / "train" / "ape")
        case "one class":
            for split in ("train", "test"):
                shutil.rmtree(root / split / "ape")
                shutil.rmtree(root / split / "Émile")
        case "case collision":
            for split in ("train", "test"):
                write_image(root / split / "Zebra" / "0.png", 0)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no train", r"is not an image folder: .*train is missing"),
        ("no test", r"is not an image folder: .*test is missing"),
        ("empty class", r"class folder .*train/zebra does not hold an image"),
        ("empty test class", r"class folder .*test/zebra does not hold an image"),
        ("class name that is not text", r"class folder '\\udcff\\udcfe' in .*train cannot be shown as text"),
        ("class name of two lines", r"class folder 'ape\\nzebra' in .*train cannot be shown as text"),
        ("class missing in test", r"class 'ape' is in .*train but not in .*test"),
        ("class missing in train", r"class 'ape' is in .*test but not in .*train"),
        ("one class", r"train holds 1 class folders"),
        ("case collision", r"train/Zebra and .*train/zebra differ only in case"),
    ],
)
def test_an_invalid_image_folder_is_refused(tmp_path, how, message):
    root = write_folder(tmp_path, COUNTS)
    scan_image_folder(root)
    broken_folder(root, how)
    with pytest.raises(UserError, match=message):
        scan_image_folder(root)


def test_class_names_in_any_script_and_any_file_name(tmp_path):
    names = ("Ωμέγα", "日本", "🐝", "a b", "-rf", "ß", "%s{0}[red]", "न\u200dक", "a\u3000b")
    root = write_folder(tmp_path, dict.fromkeys(names, (2, 1)))
    not_utf8 = os.fsdecode(os.fsencode(root / "train" / "ß") + b"/\xff")
    write_image(Path(not_utf8 + ".png"), 77)
    Path(not_utf8 + ".txt").write_text("")
    lines = []
    dataset = load_dataset("imagefolder-lt", root, report=lines.append)
    assert dataset.train.class_names == tuple(sorted(names))
    assert np.bincount(dataset.train.labels).tolist() == [3 if name == "ß" else 2 for name in sorted(names)]
    assert "\n".join(lines).encode()
    assert "\\udcff.txt" in lines[0]


def test_broken_links_and_pipes_are_refused_and_folders_skipped(tmp_path):
    def refused():
        with pytest.raises(UserError) as error:
            load_dataset("imagefolder-lt", root, report=lambda line: None)
        return str(error.value)

    root = write_folder(tmp_path, COUNTS)
    odd = root / "train" / "ape" / "odd.png"
    odd.symlink_to("nowhere")
    assert refused() == f"cannot read {odd}: No such file or directory; --bad-images skip leaves it out"
    odd.unlink()
    odd.symlink_to("odd.png")
    assert refused() == f"cannot read {odd}: Too many levels of symbolic links; --bad-images skip leaves it out"
    odd.unlink()
    os.mkfifo(odd)  # opening it would wait for a writer
    assert refused() == f"cannot read {odd}: it is not a file; --bad-images skip leaves it out"
    odd.unlink()
    odd.mkdir()
    assert len(load_dataset("imagefolder-lt", root, report=lambda line: None).train.labels) == 10


def test_folders_nested_too_deep_are_refused(tmp_path):
    root = write_folder(tmp_path / "tree", COUNTS)
    folder = os.open(root / "train" / "ape", os.O_RDONLY)
    try:
        for _ in range(2100):
            os.mkdir("d", dir_fd=folder)
            below = os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(folder)
            folder = below
        with pytest.raises(UserError, match=r"cannot read .*/d/d/d: File name too long"):
            scan_image_folder(root)
    finally:
        os.close(folder)
        subprocess.run(["rm", "-rf", root], check=True)  # too deep for shutil, and so for pytest's own cleanup


def test_an_image_folder_needs_a_path_and_images_of_one_size(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_dataset("imagefolder-lt")
    with pytest.raises(UserError, match="train is missing"):
        load_dataset("imagefolder-lt", tmp_path / "nowhere")
    root = write_folder(tmp_path, COUNTS)
    write_image(root / "test" / "ape" / "large.png", 0, size=6)
    with pytest.raises(UserError, match=r"large.png is 6x6, the first image 4x4; set --image-size"):
        load_dataset("imagefolder-lt", root, report=lambda line: None)
    for image_size in (-5, 0, 8193, 100_000):
        with pytest.raises(UserError, match=f"between 1 and 8,192 pixels, got {image_size}"):
            load_dataset("imagefolder-lt", root, image_size=image_size, report=lambda line: None)
    dataset = load_dataset("imagefolder-lt", root, image_size=5, report=lambda line: None)
    assert dataset.train.images.shape == (10, 3, 5, 5)
    assert dataset.test.images.shape == (5, 3, 5, 5)
    (root / "train" / "ape" / "3.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot decode .*train/ape/3.png"):
        load_dataset("imagefolder-lt", root, image_size=5, report=lambda line: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_imagenet(tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200", train_images=2)


@pytest.mark.parametrize("inside", [False, True])
def test_tiny_imagenet(tiny, inside):
    lines = []
    data_dir = tiny if inside else tiny.parent
    dataset = load_dataset("tinyimagenet-lt", data_dir, report=lines.append)
    assert dataset.train.class_names[:2] == ("n00010007", "n00020014")
    assert dataset.train.labels.tolist() == [label for label in range(200) for _ in range(2)]
    assert np.array_equal(dataset.train.images[:, 0, 0, 0], dataset.train.labels)
    assert np.array_equal(dataset.test.images[:, 0, 0, 0], dataset.test.labels)
    assert sorted(dataset.test.labels) == list(range(200))
    assert (dataset.n_max, dataset.pad, dataset.flip) == (500, 4, True)
    assert not any("skipped" in line or "wnids" in line for line in lines)


def broken_tiny(root, how):
    annotations = root / "val" / "val_annotations.txt"
    lines = annotations.read_text().splitlines(keepends=True)
    match how:
        case "classes":
            shutil.rmtree(root / "train" / "n00010007")
        case "no train":
            shutil.rmtree(root / "train")
        case "empty class":
            (root / "train" / "n00010007" / "images" / "n00010007_0.JPEG").unlink()
            (root / "train" / "n00010007" / "images" / "n00010007_1.JPEG").unlink()
        case "class without images/":
            shutil.rmtree(root / "train" / "n00010007" / "images")
        case "no annotations":
            annotations.unlink()
        case "unknown class":
            annotations.write_text("".join(lines).replace("n00010007", "n99999999"))
        case "image missing":
            (root / "val" / "images" / "val_7.JPEG").unlink()
        case "image without annotation":
            annotations.write_text("".join(lines[:7] + lines[8:]))
        case "image named twice":
            annotations.write_text("".join(lines) + lines[3].replace(lines[3].split("\t")[1], "n00010007"))
        case "duplicate image":
            write_image(root / "val" / "images" / "more" / "val_7.JPEG", 1, 8)
        case "annotations that are not text":
            annotations.write_bytes(b"val_0.JPEG\t\xff\xfe")
        case "annotations without tabs":
            annotations.write_text("val_0.JPEG n00010007")
        case "path in annotations":
            annotations.write_text("".join(lines).replace("val_7.JPEG", "../../val_7.JPEG"))
        case "class without test image":
            annotations.write_text("".join(lines).replace("n00010007", "n00020014"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("classes", r"train holds 199 class folders; Tiny-ImageNet has 200"),
        ("no train", r"train is missing"),
        ("empty class", r"n00010007/images does not hold an image"),
        ("class without images/", r"cannot read .*n00010007/images: No such file"),
        ("no annotations", r"cannot read .*val_annotations.txt"),
        ("unknown class", r"gives val_\d+.JPEG the class 'n99999999'"),
        ("image missing", r"do not match, first at val_7.JPEG"),
        ("image without annotation", r"do not match, first at val_7.JPEG"),
        ("image named twice", r"names val_3.JPEG twice"),
        ("duplicate image", r"val/images holds 1 files with duplicate names"),
        ("annotations that are not text", r"cannot read .*val_annotations.txt: .*utf-8"),
        ("annotations without tabs", r"gives val_0.JPEG n00010007 the class ''"),
        ("path in annotations", r"do not match, first at \.\./\.\./val_7.JPEG"),
        ("class without test image", r"names no image of class n00010007"),
    ],
)
def test_an_invalid_tiny_imagenet_is_refused(tiny, tmp_path, how, message):
    root = shutil.copytree(tiny, tmp_path / "tiny-imagenet-200")
    broken_tiny(root, how)
    with pytest.raises(UserError, match=message):
        scan_tiny_imagenet(root)


def test_a_short_class_list_is_reported(tiny, tmp_path):
    root = shutil.copytree(tiny, tmp_path / "tiny-imagenet-200")
    (root / "wnids.txt").write_text("n00010007\nn00020014\n")
    lines = []
    assert len(scan_tiny_imagenet(root, lines.append).class_names) == 200
    assert len(lines) == 1
    assert "wnids.txt lists 2 classes" in lines[0]
