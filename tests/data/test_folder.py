"""Which file is which class: trees made here, right ones and wrong ones."""

import shutil
import unicodedata

import numpy as np
import pytest
from image_trees import write_folder, write_image, write_tiny_imagenet

from ltat_fast.data import load_dataset
from ltat_fast.data.folder import scan_image_folder, scan_tiny_imagenet
from ltat_fast.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


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


def test_test_goes_before_val(tmp_path):
    root = write_folder(tmp_path, COUNTS)
    write_folder(tmp_path, dict.fromkeys(COUNTS, (0, 3)), test="val")
    assert len(scan_image_folder(root).test.paths) == 4


def test_other_files_are_left_out_and_reported(tmp_path):
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
    assert "left out 1 files" in lines[0]
    assert "notes.txt" in lines[0]


def test_a_linked_class_folder_counts(tmp_path):
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
        ("no train", r"is no image folder: .*train is missing"),
        ("no test", r"is no image folder: .*test is missing"),
        ("empty class", r"class folder .*train/zebra holds no image"),
        ("class missing in test", r"class 'ape' is in .*train but not in .*test"),
        ("class missing in train", r"class 'ape' is in .*test but not in .*train"),
        ("one class", r"train holds 1 class folders"),
        ("case collision", r"train/Zebra and .*train/zebra differ in case"),
    ],
)
def test_a_wrong_image_folder_is_refused(tmp_path, how, message):
    root = write_folder(tmp_path, COUNTS)
    scan_image_folder(root)
    broken_folder(root, how)
    with pytest.raises(UserError, match=message):
        scan_image_folder(root)


def test_image_folder_needs_a_directory_and_one_size(tmp_path):
    with pytest.raises(UserError, match="needs --data-dir"):
        load_dataset("imagefolder-lt")
    with pytest.raises(UserError, match="train is missing"):
        load_dataset("imagefolder-lt", tmp_path / "nowhere")
    root = write_folder(tmp_path, COUNTS)
    write_image(root / "test" / "ape" / "large.png", 0, size=6)
    with pytest.raises(UserError, match=r"0.png is 4x4, .*large.png is 6x6; give --image-size"):
        load_dataset("imagefolder-lt", root, report=lambda line: None)
    with pytest.raises(UserError, match="at least 1 pixel"):
        load_dataset("imagefolder-lt", root, image_size=0, report=lambda line: None)
    dataset = load_dataset("imagefolder-lt", root, image_size=5, report=lambda line: None)
    assert dataset.train.images.shape == (10, 3, 5, 5)
    assert dataset.test.images.shape == (5, 3, 5, 5)
    (root / "train" / "ape" / "3.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot decode .*train/ape/3.png"):
        load_dataset("imagefolder-lt", root, image_size=5, report=lambda line: None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_imagenet(tmp_path_factory.mktemp("tiny") / "tiny-imagenet-200", train_images=2)


@pytest.mark.parametrize("inside", [False, True])
def test_tiny_imagenet(tiny, tmp_path, inside):
    lines = []
    data_dir = tiny if inside else tiny.parent
    dataset = load_dataset("tinyimagenet-lt", data_dir, cache_dir=tmp_path / "cache", report=lines.append)
    assert dataset.train.class_names[:2] == ("n00010007", "n00020014")
    assert dataset.train.labels.tolist() == [label for label in range(200) for _ in range(2)]
    assert np.array_equal(dataset.train.images[:, 0, 0, 0], dataset.train.labels)
    assert np.array_equal(dataset.test.images[:, 0, 0, 0], dataset.test.labels)
    assert sorted(dataset.test.labels) == list(range(200))
    assert (dataset.n_max, dataset.pad, dataset.flip) == (500, 4, True)
    assert not any("left out" in line or "wnids" in line for line in lines)


def broken_tiny(root, how):
    annotations = root / "val" / "val_annotations.txt"
    lines = annotations.read_text().splitlines(keepends=True)
    match how:
        case "classes":
            shutil.rmtree(root / "train" / "n00010007")
        case "no train":
            shutil.rmtree(root / "train")
        case "empty class":
            shutil.rmtree(root / "train" / "n00010007" / "images")
        case "no annotations":
            annotations.unlink()
        case "unknown class":
            annotations.write_text("".join(lines).replace("n00010007", "n99999999"))
        case "image missing":
            (root / "val" / "images" / "val_7.JPEG").unlink()
        case "image too many":
            annotations.write_text("".join(lines[:7] + lines[8:]))
        case "class untested":
            annotations.write_text("".join(lines).replace("n00010007", "n00020014"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("classes", r"train holds 199 class folders; Tiny-ImageNet has 200"),
        ("no train", r"train is missing"),
        ("empty class", r"n00010007/images holds no image"),
        ("no annotations", r"cannot read .*val_annotations.txt"),
        ("unknown class", r"gives val_\d+.JPEG the class 'n99999999'"),
        ("image missing", r"do not match, first at val_7.JPEG"),
        ("image too many", r"do not match, first at val_7.JPEG"),
        ("class untested", r"names no image of class n00010007"),
    ],
)
def test_a_wrong_tiny_imagenet_is_refused(tiny, tmp_path, how, message):
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
