"""The cache of decoded images is used when nothing changed, missed when something changed, and never read damaged."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import tracemalloc
import zlib

import numpy as np
import pytest

from helpers.image_trees import write_folder, write_image
from ltat_fast.data import load_dataset
from ltat_fast.data.cache import CARD, NAMES, read_cache, write_cache

COUNTS = {"a": (6, 2), "b": (4, 2)}


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "tree", COUNTS)


def load(root, **options):
    """Return the dataset, whether it was decoded, and all reported lines."""
    lines = []
    dataset = load_dataset("imagefolder-lt", root, report=lines.append, **options)
    return dataset, any("decoding" in line for line in lines), lines


def cache_folders(folder):
    """Return the finished caches in ``folder``."""
    return sorted(card.parent for card in folder.glob(f"*/{CARD}") if card.parent.suffix != ".part")


def make_arrays(train=6, test=3):
    rng = np.random.RandomState(0)
    return {
        "train.images": rng.randint(0, 256, (train, 3, 4, 4), np.uint8),
        "train.labels": np.arange(train),
        "test.images": rng.randint(0, 256, (test, 3, 4, 4), np.uint8),
        "test.labels": np.arange(test),
    }


def same(one, other):
    return all(
        np.array_equal(a, b)
        for a, b in (
            (one.train.images, other.train.images),
            (one.train.labels, other.train.labels),
            (one.test.images, other.test.images),
            (one.test.labels, other.test.labels),
        )
    )


def test_the_second_start_maps_what_the_first_decoded(root):
    first, decoded, _ = load(root)
    assert decoded
    second, decoded, lines = load(root)
    assert not decoded
    assert lines == []
    assert same(first, second)
    assert isinstance(second.train.images, np.memmap)
    assert not second.train.images.flags.writeable
    (folder,) = cache_folders(root / ".ltat_fast_cache")
    assert np.array_equal(np.load(folder / "test.images.npy"), first.test.images)
    assert np.array_equal(np.load(folder / "train.labels.npy"), first.train.labels)


def test_a_changed_dataset_misses_the_cache(root):
    load(root)
    assert load(root, image_size=6)[1]
    assert not load(root, image_size=6)[1]
    write_image(root / "train" / "a" / "0.png", 200)  # the size on disk may be the same: a new modification time
    dataset, decoded, _ = load(root)
    assert decoded
    assert dataset.train.images[0].max() == 200
    (root / "train" / "a" / "5.png").rename(root / "train" / "b" / "9.png")
    dataset, decoded, _ = load(root)
    assert decoded
    assert np.bincount(dataset.train.labels).tolist() == [5, 5]
    os.utime(root / "test" / "b" / "0.png", ns=(1, 1))
    assert load(root)[1]


def test_a_damaged_cache_is_decoded_again(root):
    whole, _, _ = load(root)
    (folder,) = cache_folders(root / ".ltat_fast_cache")
    key = folder.name
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(contents) == 5
    assert read_cache(folder, key) is not None
    assert read_cache(folder, "another key") is None
    for path, content in contents.items():
        path.unlink()
        assert read_cache(folder, key) is None
        for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[: min(length, len(content) - 1)])
            assert read_cache(folder, key) is None
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
            assert read_cache(folder, key) is None, (path, position)
        path.write_bytes(content)
    card = folder / CARD
    for text in (
        b"[" * 100_000,
        b"{}",
        b"null",
        b'{"key": "%s"}' % key.encode(),
        b"\xff\xfe",
        b'{"key": 1, "crc32": 1}',
    ):
        card.write_bytes(text)
        assert read_cache(folder, key) is None
    card.write_bytes(contents[card])
    train, test = folder / "train.labels.npy", folder / "test.labels.npy"  # two whole files, exchanged
    train.write_bytes(contents[test])
    test.write_bytes(contents[train])
    assert read_cache(folder, key) is None
    again, decoded, _ = load(root)
    assert decoded
    assert same(whole, again)
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_pickled_array_is_refused(tmp_path):
    """An array of objects is never unpickled, not even if the checksums are right."""
    folder = tmp_path / "k"
    write_cache(folder, "k", make_arrays())
    np.save(folder / "test.labels.npy", np.array([{}], object), allow_pickle=True)
    card = json.loads((folder / CARD).read_text())
    card["crc32"]["test.labels.npy"] = zlib.crc32((folder / "test.labels.npy").read_bytes())
    (folder / CARD).write_text(json.dumps(card))
    assert read_cache(folder, "k") is None


def test_files_of_a_killed_writer_do_no_harm(root):
    """A process that is killed while it writes leaves a temporary folder; the next process replaces it."""
    script = f"""
        import os, signal
        from pathlib import Path
        from ltat_fast.data import cache, load_dataset

        cache.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        load_dataset("imagefolder-lt", Path({str(root)!r}))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert cache_folders(root / ".ltat_fast_cache") == []
    assert len(list((root / ".ltat_fast_cache").glob("*.part"))) == 1
    assert load(root)[1]
    assert not load(root)[1]
    assert list((root / ".ltat_fast_cache").glob("*.part")) == []


def test_two_processes_at_once_decode_once(root):
    for i in range(600):
        write_image(root / "train" / "a" / f"more{i}.png", i % 256, 16)
        write_image(root / "train" / "a" / f"{i}.png", i % 256, 16)
    script = f"""
        import hashlib
        from pathlib import Path
        from ltat_fast.data import load_dataset

        dataset = load_dataset("imagefolder-lt", Path({str(root)!r}), image_size=16)
        print(hashlib.sha256(dataset.train.images.tobytes()).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("decoding" in output for output in outputs) == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]
    assert len(cache_folders(root / ".ltat_fast_cache")) == 1


def test_two_processes_at_once_replace_a_damaged_cache(root):
    whole, _, _ = load(root)
    (folder,) = cache_folders(root / ".ltat_fast_cache")
    (folder / "train.images.npy").write_bytes(b"damaged")
    script = f"""
        import hashlib
        from pathlib import Path
        from ltat_fast.data import load_dataset

        dataset = load_dataset("imagefolder-lt", Path({str(root)!r}))
        print(hashlib.sha256(dataset.train.images.tobytes()).hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("decoding" in output for output in outputs) == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]
    again, decoded, _ = load(root)
    assert not decoded
    assert same(whole, again)


def test_a_folder_that_is_not_writable_is_reported_and_skipped(root, tmp_path, monkeypatch):
    (root / ".ltat_fast_cache").write_text("a file in place of the folder")
    _, decoded, lines = load(root)
    assert decoded
    assert any("cannot keep decoded images in" in line for line in lines)
    assert len(cache_folders(tmp_path / "xdg" / "ltat_fast")) == 1
    assert not load(root)[1]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, decoded, lines = load(root)
    assert decoded
    assert sum("cannot keep" in line for line in lines) == 2


@pytest.fixture
def small_files():
    """Limit the size of files to 50,000 bytes. It stands in for a full disk: write() fails in the same way."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_file(tmp_path, small_files):
    for size in (50_000 - 128 + 1, 100_000):  # the first is too large by one byte
        arrays = make_arrays() | {"train.images": np.zeros(size, np.uint8)}
        with pytest.raises(OSError, match="File too large"):
            write_cache(tmp_path / "k", "k", arrays)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported(root, small_files):
    dataset, decoded, lines = load(root, image_size=64)
    assert decoded
    assert dataset.train.images.shape == (10, 3, 64, 64)
    assert lines[-1] == f"cannot keep decoded images in {root / '.ltat_fast_cache'}: File too large"
    assert cache_folders(root / ".ltat_fast_cache") == []


def test_write_then_read(tmp_path):
    for arrays in (make_arrays(), make_arrays(9, 5)):  # the second replaces the first
        write_cache(tmp_path / "k", "k", arrays)
        read = read_cache(tmp_path / "k", "k")
        assert read.keys() == set(NAMES)
        for name, array in arrays.items():
            assert np.array_equal(read[name], array)
            assert read[name].dtype == array.dtype
    kept = {name: array.copy() for name, array in read.items()}
    shutil.rmtree(tmp_path / "k")  # the maps stay valid
    assert all(np.array_equal(read[name], kept[name]) for name in kept)


def test_reading_and_writing_copy_no_array(tmp_path):
    arrays = make_arrays() | {"train.images": np.zeros((1000, 3, 64, 64), np.uint8)}
    tracemalloc.start()
    try:
        write_cache(tmp_path / "k", "k", arrays)
        assert read_cache(tmp_path / "k", "k") is not None
        assert tracemalloc.get_traced_memory()[1] < arrays["train.images"].nbytes / 4
    finally:
        tracemalloc.stop()
