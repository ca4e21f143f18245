"""Image files that cannot be read or decoded: named all at once, or left out, counted and listed."""

import os

import numpy as np
import pytest

from helpers.image_trees import write_folder, write_image_lists
from ltat_fast.data import index_hash, load_dataset, make_long_tailed
from ltat_fast.data.decode import NAMED_FILES
from ltat_fast.errors import UserError

COUNTS = {"a": (30, 2), "b": (10, 3)}


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "tree", COUNTS)


def load(root, name="imagefolder-lt", **options):
    lines = []
    return load_dataset(name, root, report=lines.append, **options), lines


def damage(*paths):
    for path in paths:
        path.write_bytes(path.read_bytes()[:40])


def test_stop_names_all_bad_files(root):
    bad = [root / "train" / "a" / "0.png", root / "train" / "b" / "9.png", root / "test" / "b" / "1.png"]
    damage(*bad)
    with pytest.raises(UserError, match=r"^3 images cannot be used \(--bad-images skip leaves them out\): ") as error:
        load(root)
    (root / "train" / "a" / "link.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^4 images cannot be used .*cannot decode .*cannot read .*link.png: No such"):
        load(root)
    reasons = str(error.value).partition("out): ")[2].split("; cannot")
    assert [str(path) in reason for path, reason in zip(bad, reasons, strict=True)] == [True] * 3


def test_stop_names_some_of_many_bad_files_and_counts_the_others(root):
    damage(*(root / "train" / "a" / f"{i}.png" for i in range(NAMED_FILES + 5)))
    with pytest.raises(UserError, match=r"^25 images cannot be used .*; and 5 more$") as error:
        load(root)
    assert str(error.value).count(".png") == NAMED_FILES


def test_skip_without_bad_images_changes_nothing(root):
    (stop, _), (skip, lines) = load(root), load(root, bad_images="skip")
    assert np.array_equal(stop.train.images, skip.train.images)
    assert make_long_tailed(stop, 2).index_hash == make_long_tailed(skip, 2).index_hash
    assert not any("left out" in line for line in lines)
    assert skip.left_out == ()


def test_skip_leaves_bad_files_out_lists_them_and_changes_the_hash(root):
    whole, _ = load(root)
    damage(root / "train" / "a" / "0.png", root / "test" / "b" / "1.png")
    missing = root / "train" / "b" / "link.png"
    missing.symlink_to("nowhere")
    os.mkfifo(root / "train" / "b" / "pipe.png")  # opening it would wait for a writer
    names = ("train/a/0.png", "train/b/link.png", "train/b/pipe.png", "test/b/1.png")
    hashes = set()
    for start in ("decoded", "from the cache"):
        dataset, lines = load(root, bad_images="skip")
        assert any("decoding" in line for line in lines) == (start == "decoded")
        assert dataset.left_out == names
        assert lines[-1] == f"left out 4 bad images: {'; '.join(names)}"
        assert np.array_equal(dataset.train.images, whole.train.images[1:])
        assert np.array_equal(dataset.train.labels, whole.train.labels[1:])
        assert np.array_equal(dataset.test.images[:, 0, 0, 0], [0, 1, 2, 4])
        assert dataset.test.labels.tolist() == [0, 0, 1, 1]
        tailed = make_long_tailed(dataset, None)
        assert tailed.indices.tolist() == list(range(1, 40))
        hashes.add(tailed.index_hash)
    assert hashes == {index_hash(np.arange(1, 40))}
    assert hashes != {make_long_tailed(whole, None).index_hash, index_hash(np.arange(39))}


def test_a_repaired_file_is_used_again(root):
    whole, _ = load(root)
    file = root / "train" / "a" / "3.png"
    content = file.read_bytes()
    damage(file)
    assert len(load(root, bad_images="skip")[0].train.labels) == 39
    file.write_bytes(content)
    dataset, _ = load(root, bad_images="skip")
    assert np.array_equal(dataset.train.images, whole.train.images)


def test_a_class_or_split_whose_images_are_all_bad_is_refused(root, tmp_path):
    damage(*(root / "train" / "b").iterdir())
    with pytest.raises(UserError, match="class 'b' has no train image"):
        load(root, bad_images="skip")
    damage(*(root / "train" / "a").iterdir(), *root.glob("test/*/*"))
    with pytest.raises(UserError, match=r"^45 images cannot be used"):
        load(root, bad_images="skip")
    lists = write_image_lists(tmp_path / "lists", (2, 2), [(8, 8)])
    damage(*lists.glob("val/*/*"))
    with pytest.raises(UserError, match="the validation split has no image that can be used"):
        load(lists, "imagelist-lt", bad_images="skip")
    for path in [*lists.glob("*/*/*")]:
        path.unlink()
    with pytest.raises(UserError, match=r"^8 images cannot be used .*No such file"):
        load(lists, "imagelist-lt", bad_images="skip")
