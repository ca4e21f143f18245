"""Valid and malicious pickles of CIFAR. Those of Python 2, as published, are written by hand."""

import hashlib
import io
import os
import pickle
import pickletools
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ltat_fast.data.cifar import load_batch, load_pickle, read_cifar
from ltat_fast.errors import UserError

PATH = Path("data_batch_1")
ROWS = np.random.RandomState(0).randint(0, 256, (4, 3072)).astype(np.uint8)


def python2(rows, labels):
    """Return the pickle of {'data': rows, 'labels': labels} in the opcodes of the published files."""
    data = rows.tobytes()
    numbers = b"".join(b"K" + bytes([label]) for label in labels)
    shape = b"M" + len(rows).to_bytes(2, "little") + b"M\x00\x0c\x86"
    return (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01"
        + shape
        + b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + len(data).to_bytes(4, "little") + data + b"tbU\x06labels](" + numbers + b"eu."
    )


def test_a_batch_in_the_format_of_the_published_files():
    content = python2(ROWS, [3, 0, 9, 9])
    assert {op.name for op, *_ in pickletools.genops(content)} >= {"GLOBAL", "BINSTRING", "BUILD"}
    assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], ROWS)  # NumPy reads the same
    images, labels = load_batch(content, PATH, 10)
    assert np.array_equal(images, ROWS.reshape(4, 3, 32, 32))
    assert images.dtype == np.uint8
    assert labels.tolist() == [3, 0, 9, 9]
    assert labels.dtype == np.int64


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("rows", [ROWS, np.asfortranarray(ROWS)], ids=["rows first", "columns first"])
def test_every_pickle_protocol(protocol, rows):
    content = pickle.dumps({"data": rows, "fine_labels": [0, 1, 2, 3]}, protocol)
    assert np.array_equal(load_batch(content, PATH, 100)[0], ROWS.reshape(4, 3, 32, 32))


class RunsCode:
    """Its pickle calls a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "entry",
    [
        lambda target: RunsCode(os.system, (f"touch {target}",)),
        lambda target: {"data": RunsCode(exec, (f"open({str(target)!r}, 'w')",)), "labels": [0]},
        lambda target: {"data": ROWS, "labels": [0] * 4, "more": [RunsCode(Path.touch, (target,))]},
        lambda target: {"data": ROWS, "labels": RunsCode(eval, (f"[open({str(target)!r}, 'w')]",))},
        lambda target: {"data": RunsCode(np.fromfile, (str(target),))},
    ],
    ids=["system", "exec", "aside", "eval", "numpy"],
)
def test_a_pickle_that_runs_code_is_refused(tmp_path, entry):
    content = pickle.dumps(entry(tmp_path / "ran"), 2)
    with pytest.raises(UserError, match=r"data_batch_1 is not a CIFAR file: it asks for .*, which is not data"):
        load_pickle(content, PATH)
    assert not (tmp_path / "ran").exists()
    if "numpy" not in repr(content):
        pickle.loads(content)
        assert (tmp_path / "ran").exists()  # the standard unpickler runs the code


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"data": ROWS, "labels": [0, 1, 2]}, "does not hold one label for each of its 4 images"),
        ({"data": ROWS, "labels": [0, 1, 2, 3, 4]}, "does not hold one label for each"),
        ({"data": ROWS, "labels": [0, 1, 2, 10]}, r"has the label 10, expected an integer in 0\.\.9"),
        ({"data": ROWS, "labels": [0, 1, 2, -1]}, "has the label -1, expected"),
        ({"data": ROWS, "labels": [0, 1, 2, 1.0]}, "has the label 1.0, expected"),
        ({"data": ROWS, "labels": [0, 1, 2, True]}, "has the label True, expected"),
        ({"data": ROWS, "labels": "0123"}, "does not hold one label for each"),
        ({"data": ROWS}, "does not hold one label for each"),
        ({"data": ROWS[:, :-1], "labels": [0] * 4}, "does not hold rows of 3,072 bytes"),
        ({"data": ROWS.reshape(-1), "labels": [0] * 4}, "does not hold rows of 3,072 bytes"),
        ({"data": ROWS.tolist(), "labels": [0] * 4}, "does not hold rows of 3,072 bytes"),
        ({"labels": [0] * 4}, "does not hold rows of 3,072 bytes"),
        ({"data": ROWS.astype(np.float32), "labels": [0] * 4}, "is not a CIFAR file: an array that is not uint8"),
        ({"data": ROWS.astype(object), "labels": [0] * 4}, "is not a CIFAR file"),
        ([ROWS, [0] * 4], "is not a CIFAR file"),
        (None, "is not a CIFAR file"),
    ],
)
def test_a_pickle_that_is_not_a_batch_is_refused(entry, message):
    with pytest.raises(UserError, match=f"^data_batch_1 {message}"):
        load_batch(pickle.dumps(entry, 2), PATH, 10)


def test_damaged_pickles_are_refused():
    content = python2(ROWS, [3, 0, 9, 9])
    for length in (0, 1, 10, 60, 100, len(content) // 2, len(content) - 1):
        with pytest.raises(UserError, match="is not a CIFAR file"):
            load_batch(content[:length], PATH, 10)
    shape = content.index(b"M\x04\x00M\x00\x0c")
    for huge in (b"M\xff\xff", b"M\x03\x00", b"M\x00\x00"):
        with pytest.raises(UserError, match="is not a CIFAR file: cannot reshape"):
            load_batch(content[:shape] + huge + content[shape + 3 :], PATH, 10)


def archived(folder, members, kind=tarfile.REGTYPE):
    path = folder / "cifar.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return path


def test_archives_are_read_without_unpacking(tmp_path):
    contents = {"train": python2(ROWS, [0, 1, 0, 1]), "test": python2(ROWS[::-1], [1, 1, 0, 0])}
    contents["meta"] = pickle.dumps({"label_names": ["cat", "dog"]}, 2)
    files = {name: [name, hashlib.md5(content).hexdigest()] for name, content in contents.items()}
    published = SimpleNamespace(
        base_folder="batches",
        train_list=[files["train"]],
        test_list=[files["test"]],
        meta={"filename": "meta", "key": "label_names", "md5": files["meta"][1]},
    )
    members = {f"batches/{name}": content for name, content in contents.items()}

    def read(members, **options):
        return read_cifar(published, tmp_path, lambda: archived(tmp_path, members, **options))

    malicious = {"../evil": b"x", "/tmp/ltat_fast_test_evil": b"x", "other/train": contents["test"]}
    (images, labels), (test_images, _), names = read(malicious | members)
    assert names == ("cat", "dog")
    assert np.array_equal(images, ROWS.reshape(4, 3, 32, 32))
    assert np.array_equal(test_images, ROWS[::-1].reshape(4, 3, 32, 32))
    assert labels.tolist() == [0, 1, 0, 1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cifar.tar.gz"]
    assert not Path("/tmp/ltat_fast_test_evil").exists()

    with pytest.raises(UserError, match=r"cifar.tar.gz does not hold batches/train"):
        read(members, kind=tarfile.SYMTYPE)
    with pytest.raises(UserError, match=r"cifar.tar.gz holds a damaged batches/test: md5 \w+, expected \w+"):
        read(members | {"batches/test": contents["train"]})
    (tmp_path / "cut.tar.gz").write_bytes(archived(tmp_path, members).read_bytes()[:500])
    with pytest.raises(UserError, match=r"cannot unpack .*cut.tar.gz"):
        read_cifar(published, tmp_path, lambda: tmp_path / "cut.tar.gz")
