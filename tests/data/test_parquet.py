"""Images in Parquet files, written as the Hugging Face hub stores them."""

import io
import json
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from ltat_fast.data import load_dataset
from ltat_fast.errors import UserError

if find_spec("pyarrow") is None:
    pytest.skip("pyarrow is not installed", allow_module_level=True)

import pyarrow as pa
from pyarrow import parquet

NAMES = ("ape", "bee", "cow")
LABELS = {"train": [2, 0, 1, 0, 0, 1, 2, 0, 1], "validation": [1, 0], "test": [0, 1, 2, 2]}


def png(value, size=4):
    content = io.BytesIO()
    Image.fromarray(np.full((size, size, 3), value, np.uint8)).save(content, format="PNG")
    return content.getvalue()


def write_shard(file, images, labels, names=NAMES, column="label", **others):
    """Write one file. images: the content of the image files, None for a row without one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    structs = pa.array([{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(images)])
    table = pa.table({"image": structs, column: pa.array(labels, pa.int64()), **others})
    if names:
        features = {"image": {"_type": "Image"}, column: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, file, row_group_size=2)


def write_split(root, split, labels, **options):
    """Write a split in two files. The pixels of an image are its place in the split."""
    half = len(labels) // 2
    for part, rows in enumerate((range(half), range(half, len(labels)))):
        file = root / "data" / f"{split}-{part:05}-of-00002.parquet"
        write_shard(file, [png(i) for i in rows], [labels[i] for i in rows], **options)


@pytest.fixture
def root(tmp_path):
    for split, labels in LABELS.items():
        write_split(tmp_path / "set", split, labels)
    return tmp_path / "set"


def load(root, **options):
    lines = []
    return load_dataset("parquet-lt", root, report=lines.append, **options), lines


def test_every_row_has_its_image_label_and_split(root):
    for start in ("decoded", "from the cache"):
        dataset, lines = load(root)
        assert any("decoding" in line for line in lines) == (start == "decoded")
        parts = {"train": dataset.train, "validation": dataset.val, "test": dataset.test}
        for split, part in parts.items():
            assert part.labels.tolist() == LABELS[split]
            assert part.images[:, 1, 2, 2].tolist() == list(range(len(LABELS[split])))
            assert part.class_names == NAMES
    write_split(root, "train", LABELS["train"][::-1])  # the files changed
    assert load(root)[0].train.labels.tolist() == LABELS["train"][::-1]


def test_many_rows_in_many_threads_keep_their_order(tmp_path):
    labels = [i % 3 for i in range(1500)]
    for split in ("train", "test"):
        images = [png(i % 251, size=2) for i in range(1500)]
        write_shard(tmp_path / f"{split}-0.parquet", images, labels, names=None)
    dataset, _ = load(tmp_path)
    assert dataset.train.images[:, 0, 0, 0].tolist() == [i % 251 for i in range(1500)]
    assert dataset.train.class_names == ("0", "1", "2")


def test_hidden_test_labels_make_the_validation_split_the_test_split(root):
    write_split(root, "test", [-1, -1])
    write_split(root, "validation", [1, 0, 2])
    dataset, lines = load(root)
    assert dataset.val is None
    assert dataset.test.labels.tolist() == [1, 0, 2]
    assert lines[0] == f"{root / 'data'}: the test split has no labels and is not used"


def test_bad_rows_are_named_or_left_out(root):
    file = root / "data" / "train-00000-of-00002.parquet"
    write_shard(file, [png(0), None, b"no image", png(3)], LABELS["train"][:4])
    with pytest.raises(UserError, match=r"^2 images cannot be used") as error:
        load(root)
    assert f"cannot decode {file}:1: the row has no image bytes; cannot decode {file}:2: it is damaged" in str(
        error.value
    )
    dataset, _ = load(root, bad_images="skip")
    assert dataset.left_out == (f"data/{file.name}:1", f"data/{file.name}:2")
    assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 3, 4, 5, 6, 7, 8]


def broken(root, how):
    file = root / "data" / "train-00001-of-00002.parquet"
    two = [png(0), png(1)]
    match how:
        case "no training files":
            for path in root.glob("data/train-*"):
                path.unlink()
        case "no other files":
            for path in [*root.glob("data/test-*"), *root.glob("data/val*")]:
                path.unlink()
        case "cut file":
            file.write_bytes(file.read_bytes()[:-20])
        case "label out of range":
            write_shard(file, two, [0, 3])
        case "no label":
            write_shard(file, two, [0, None])
        case "class without training image":
            write_split(root, "train", [0, 1, 1])
        case "two columns of numbers":
            write_shard(file, two, [0, 1], column="fine", coarse=pa.array([0, 0]))
        case "no images":
            parquet.write_table(pa.table({"label": [0, 1]}), file)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no training files", r"data has no train-\*.parquet$"),
        ("no other files", r"data has no test-\*.parquet or validation-\*.parquet with labels$"),
        ("cut file", r"cannot read .*train-00001-of-00002.parquet: "),
        ("label out of range", r"train-00001-of-00002.parquet:1: the label 3 is not in 0\.\.2, the classes"),
        ("no label", r"train-00001-of-00002.parquet: 1 rows have no label$"),
        ("class without training image", r"class 'cow' has no training image$"),
        ("two columns of numbers", r"2 columns that can be the labels; name the right one 'label'$"),
        ("no images", r"0 columns that can be the images; name the right one 'image'$"),
    ],
)
def test_wrong_files_are_refused(root, how, message):
    broken(root, how)
    with pytest.raises(UserError, match=message):
        load(root)
