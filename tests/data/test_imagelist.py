"""Lists of images: the class and split of each file, and wrong lists."""

import shutil

import numpy as np
import pytest

from helpers.image_trees import write_image, write_image_lists
from ltat_fast.data import load_dataset, make_long_tailed
from ltat_fast.data.imagelist import scan_image_lists
from ltat_fast.errors import UserError

COUNTS = (5, 3, 2)
SIZES = ((12, 9), (8, 8), (30, 17))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_image_lists(tmp_path_factory.mktemp("lists") / "tree", COUNTS, SIZES, test=2)


@pytest.fixture
def root(written, tmp_path):
    return shutil.copytree(written, tmp_path / "tree")


def load(root, name="imagelist-lt", **options):
    lines = []
    return load_dataset(name, root, image_size=8, report=lines.append, **options), lines


def class_brightness(part):
    """The mean brightness of each class in order."""
    return [part.images[part.labels == c].mean() for c in range(len(part.class_names))]


@pytest.mark.parametrize("prefix", ["", "ImageNet_LT_"])
def test_every_image_has_its_label_and_split(root, prefix):
    for split in ("train", "val", "test"):
        (root / f"{split}.txt").rename(root / f"{prefix}{split}.txt")
    for _ in ("decoded", "from the cache"):
        dataset, _ = load(root)
        sizes = [np.bincount(part.labels).tolist() for part in (dataset.train, dataset.test, dataset.val)]
        assert sizes == [[5, 3, 2], [2, 2, 2], [1, 1, 1]]
        for part in (dataset.train, dataset.test, dataset.val):
            assert part.images.shape == (len(part.labels), 3, 8, 8)
            assert class_brightness(part) == pytest.approx([20, 92, 163], abs=8)
        assert dataset.train.class_names == ("0", "1", "2")
        assert dataset.left_out == ()


def test_the_order_of_the_list_is_kept(root):
    tree = scan_image_lists(root)
    lines = (root / "train.txt").read_text().splitlines()
    assert [f"{path} {label}" for path, label in zip(tree.train.paths, tree.train.labels, strict=True)] == [
        f"{root}/{line}" for line in lines
    ]


def test_without_a_test_list_the_validation_list_is_the_test_split(root):
    (root / "test.txt").unlink()
    dataset, _ = load(root)
    assert dataset.val is None
    assert len(dataset.test.labels) == 3


def test_the_groups_of_liu_are_added_to_those_of_the_paper(root):
    (root / "test" / "class 0" / "0.JPEG").unlink()
    dataset, lines = load(root, "imagenet-lt", bad_images="skip")
    assert dataset.left_out == ("test/class 0/0.JPEG",)
    groups = make_long_tailed(dataset, None).groups
    assert groups == {
        "head": [0],
        "medium": [1],
        "tail": [2],
        "many_shot": [],
        "medium_shot": [],
        "few_shot": [0, 1, 2],
    }
    (said,) = (line for line in lines if line.startswith("imagenet-lt: the lists have"))
    assert said.endswith("3 classes and 10 training images; ImageNet-LT has 1,000 and 115,846")


def broken(root, how):
    train = root / "train.txt"
    lines = train.read_text().splitlines(keepends=True)
    match how:
        case "no folder":
            shutil.rmtree(root)
        case "no training list":
            train.unlink()
        case "no other list":
            (root / "val.txt").unlink()
            (root / "test.txt").unlink()
        case "two lists":
            train.rename(root / "A_train.txt")
            shutil.copy(root / "A_train.txt", root / "B_train.txt")
        case "no label":
            train.write_text("".join(lines[:3]) + "image.JPEG\n")
        case "label that is a name":
            train.write_text("\nimage.JPEG ape\n")
        case "label with an underscore":
            train.write_text("image.JPEG 1_0\n")
        case "negative label":
            train.write_text("image.JPEG -1\n")
        case "label out of range":
            (root / "test.txt").write_text("image.JPEG 0\nimage.JPEG 3\n")
        case "label out of range in val":
            (root / "val.txt").write_text("image.JPEG 1000\n")
        case "empty training list":
            train.write_text("\n \n")
        case "empty test list":
            (root / "test.txt").write_text("")
        case "class without training image":
            train.write_text("".join(line for line in lines if not line.endswith(" 1\n")))
        case "one class":
            train.write_text("".join(line for line in lines if line.endswith(" 0\n")))
        case "not text":
            train.write_bytes(b"image\xff.JPEG 0\n")
        case "zero byte":
            train.write_bytes(b"image\0.JPEG 0\n")
        case "missing image":
            shutil.move(root / "val" / "class 2" / "0.JPEG", root / "elsewhere")
        case "missing images":
            shutil.rmtree(root / "train" / "class 0")
        case "test list without a class":
            (root / "test.txt").write_text("test/class 0/0.JPEG 0\n")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no folder", r"tree is not a folder \(expected train.txt"),
        ("no training list", r"tree has no train.txt with lines"),
        ("no other list", r"tree has no test.txt or val.txt with lines"),
        ("two lists", r"two lists of the train images, A_train.txt and B_train.txt"),
        ("no label", r"train.txt, line 4: 'image.JPEG' is not \"relative/path label\"$"),
        ("label that is a name", r"train.txt, line 2: the label 'ape' is not a whole number$"),
        ("label with an underscore", r"train.txt, line 1: the label '1_0' is not a whole number$"),
        ("negative label", r"train.txt, line 1: the label -1 is not 0 or more$"),
        ("label out of range", r"test.txt, line 2: the label 3 is not in 0..2, the labels of the training list$"),
        ("label out of range in val", r"val.txt, line 1: the label 1000 is not in 0..2"),
        ("empty training list", r"train.txt lists no image$"),
        ("empty test list", r"test.txt lists no image$"),
        ("class without training image", r"class 1 has no training image, but the labels go up to 2$"),
        ("one class", r"has one class; at least two are needed$"),
        ("not text", r"cannot read .*train.txt: 'utf-8'"),
        ("zero byte", r"train.txt, line 1: 'image\\x00.JPEG 0' is not"),
        (
            "missing image",
            r"^cannot read .*class 2/0.JPEG: No such file or directory; --bad-images skip leaves it out$",
        ),
        ("missing images", r"^5 images cannot be used .*: cannot read .*class 0/\d.JPEG: No such file"),
        ("test list without a class", r"imagelist-lt: class '1' has no test image"),
    ],
)
def test_wrong_lists_are_refused(root, how, message):
    load(root)
    broken(root, how)
    with pytest.raises(UserError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def test_a_list_needs_its_folder_and_an_image_size(root):
    with pytest.raises(UserError, match=r"imagenet-lt needs --data-dir, a folder with train\.txt"):
        load_dataset("imagenet-lt")
    with pytest.raises(UserError, match=r"images differ in size: .* set --image-size"):
        load_dataset("imagelist-lt", root, report=lambda line: None)


def test_a_path_may_lead_to_another_folder(root, tmp_path):
    write_image(tmp_path / "elsewhere" / "a.png", 200)
    with (root / "train.txt").open("a") as file:
        file.write(f"{tmp_path}/elsewhere/a.png 2\n../elsewhere/a.png\t2\r\n")
    dataset, _ = load(root)
    assert dataset.train.labels.tolist()[-2:] == [2, 2]
    assert (dataset.train.images[-2:] == 200).all()
