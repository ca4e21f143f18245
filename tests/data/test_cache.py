"""The cache of decoded images is used when nothing changed, missed when something changed, and never read damaged."""

import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
import zlib

import numpy as np
import pytest

from helpers.image_trees import write_folder, write_image
from ltat_fast.data import decode, load_dataset
from ltat_fast.data.cache import CARD, read_cache
from ltat_fast.data.decode import read_image
from ltat_fast.data.digest import digest
from ltat_fast.data.partial import InMemory, OnDisk, npy_header

COUNTS = {"a": (6, 2), "b": (4, 2)}
SPLITS = ("train", "test")


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


def pixels(dataset):
    """Return a copy of all pixels; the arrays of a dataset are maps of files that a test may damage."""
    return [part.images.copy() for part in (dataset.train, dataset.test)]


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
    assert np.array_equal(np.load(folder / "test.npy"), first.test.images)
    assert np.array_equal(np.load(folder / "train.npy"), first.train.images)


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
    assert len(contents) == 3
    assert read_cache(folder, key, SPLITS) is not None
    assert read_cache(folder, "another key", SPLITS) is None
    for path, content in contents.items():
        path.unlink()
        assert read_cache(folder, key, SPLITS) is None
        for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[: min(length, len(content) - 1)])
            assert read_cache(folder, key, SPLITS) is None
        for position in range(len(content)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
            assert read_cache(folder, key, SPLITS) is None, (path, position)
        path.write_bytes(content)
    card = folder / CARD
    for text in (
        b"[" * 100_000,
        b"{}",
        b"null",
        b'{"key": "%s"}' % key.encode(),
        b"\xff\xfe",
        b'{"content": {"key": 1, "crc32": 1}, "sha256": 1}',
    ):
        card.write_bytes(text)
        assert read_cache(folder, key, SPLITS) is None
    card.write_bytes(contents[card])
    train, test = folder / "train.npy", folder / "test.npy"  # two whole files, exchanged
    train.write_bytes(contents[test])
    test.write_bytes(contents[train])
    assert read_cache(folder, key, SPLITS) is None
    again, decoded, _ = load(root)
    assert decoded
    assert same(whole, again)
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents


def test_a_pickled_array_is_refused(root):
    """An array of objects is never unpickled, not even if the checksums are right."""
    load(root)
    (folder,) = cache_folders(root / ".ltat_fast_cache")
    np.save(folder / "test.npy", np.array([{}], object), allow_pickle=True)
    content = json.loads((folder / CARD).read_text())["content"]
    content["crc32"]["test.npy"] = [zlib.crc32((folder / "test.npy").read_bytes())]
    (folder / CARD).write_text(json.dumps({"content": content, "sha256": digest(content)}))
    assert read_cache(folder, folder.name, SPLITS) is None


KILLED = """
    import os, signal
    from pathlib import Path
    from ltat_fast.data import decode, load_dataset, partial

    partial.SYNC_SECONDS = 0.0
    decode.BLOCK_IMAGES = 4
    syncs = []
    real = os.fsync
    def fsync(file):
        syncs.append(file)
        if len(syncs) == {sync}:
            os.kill(os.getpid(), signal.SIGKILL)
        real(file)
    os.fsync = fsync
    load_dataset("imagefolder-lt", Path({root!r}), report=print)
"""


@pytest.mark.parametrize("sync", [2, 3, 8, 16])
def test_a_killed_decoding_is_continued(root, tmp_path, monkeypatch, sync):
    """Killed in one of 16 syncs: three for each of 4 blocks, three at the end, one of the card."""
    whole = load(write_folder(tmp_path / "whole", COUNTS))[0]
    script = textwrap.dedent(KILLED).format(sync=sync, root=str(root))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    cache_folder = root / ".ltat_fast_cache"
    assert cache_folders(cache_folder) == []
    assert len(list(cache_folder.glob("*.part"))) == 1

    opened = []
    monkeypatch.setattr(decode, "BLOCK_IMAGES", 4)
    monkeypatch.setattr(decode, "read_image", lambda path, *rest: opened.append(path) or read_image(path, *rest))
    continued, _, lines = load(root)
    blocks = min(sync // 3, 4) if sync < 16 else 0  # nothing is continued after the files are finished
    # The first image is read for its size. Blocks of 4, 4, 2 and 4 images may finish in any order.
    assert len(opened) - 1 in {14 - sum(done) for done in itertools.combinations((4, 4, 2, 4), blocks)}
    assert (f"continuing an interrupted decoding of {root}" in lines) == (blocks > 0)
    assert same(whole, continued)
    assert list(cache_folder.glob("*.part")) == []
    assert not load(root)[1]


@pytest.mark.parametrize("end", [b"", b'{"start": 8, "ba', b"\xff", b'{"start": 8, "bad": {}}', b"null\n", b"[1]\n"])
def test_a_damaged_end_of_the_journal_is_cut_off(tmp_path, end):
    about, counts, shape = {"key": "k"}, {"train": 12, "test": 4}, (1, 2, 2)
    pixels = np.arange(16, dtype=np.uint8)[:, None, None, None] * np.ones(shape, np.uint8)
    first = OnDisk(tmp_path / "k", about, counts, shape)
    first.write(0, pixels[:4], {})
    first.write(4, pixels[4:8], {5: "it is bad"})
    first.close()
    journal = tmp_path / "k" / "decoded.jsonl"
    journal.write_bytes(journal.read_bytes() + end)
    second = OnDisk(tmp_path / "k", about, counts, shape)
    if end == b"\xff":  # not text: nothing is known
        assert second.finished == set()
        return
    assert second.finished == {0, 4}
    assert second.bad == {5: "it is bad"}
    second.write(8, pixels[8:12], {})
    second.write(12, pixels[12:], {15: "bad too"})
    second.close()
    third = OnDisk(tmp_path / "k", about, counts, shape)
    assert third.finished == {0, 4, 8, 12}
    images = third.finish()
    assert images["train"][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert images["test"][:, 0, 0, 0].tolist() == [12, 13, 14]
    assert OnDisk(tmp_path / "k", {"key": "other"}, counts, shape).finished == set()


def test_memory_and_disk_give_the_same_arrays(tmp_path):
    rng = np.random.RandomState(0)
    counts, shape, bad = {"train": 9, "test": 5}, (3, 4, 5), {0: "a", 4: "b", 9: "c", 13: "d"}
    pixels = rng.randint(0, 256, (14, *shape), np.uint8)
    both = InMemory(counts, shape), OnDisk(tmp_path / "k", {}, counts, shape)
    for blocks in both:
        for start, stop in ((6, 9), (0, 6), (9, 14)):
            blocks.write(start, pixels[start:stop], {i: bad[i] for i in bad if start <= i < stop})
    memory, disk = (blocks.finish() for blocks in both)
    for split, first, count in (("train", 0, 9), ("test", 9, 5)):
        expected = pixels[[i for i in range(first, first + count) if i not in bad]]
        assert np.array_equal(memory[split], expected)
        assert np.array_equal(disk[split], expected)


@pytest.mark.parametrize("shape", [(0, 3, 1, 1), (115_846, 3, 256, 256), (10**9, 3, 8192, 8192)])
def test_npy_header(shape):
    file = io.BytesIO(npy_header(shape))
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(np.uint8))
    assert file.tell() == 128


def test_two_processes_at_once_decode_once(root):
    for i in range(600):
        write_image(root / "train" / "a" / f"more{i}.png", i % 256, 16)
        write_image(root / "train" / "a" / f"{i}.png", i % 256, 16)
    script = f"""
        import hashlib
        from pathlib import Path
        from ltat_fast.data import cache, decode, load_dataset

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
    whole = pixels(load(root)[0])
    (folder,) = cache_folders(root / ".ltat_fast_cache")
    (folder / "train.npy").write_bytes(b"damaged")
    script = f"""
        import hashlib
        from pathlib import Path
        from ltat_fast.data import cache, decode, load_dataset

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
    assert all(map(np.array_equal, whole, pixels(again)))


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


def test_a_full_disk_is_reported_and_leaves_no_file(root, tmp_path, small_files):
    dataset, decoded, lines = load(root, image_size=64)
    assert decoded
    assert dataset.train.images.shape == (10, 3, 64, 64)
    folders = root / ".ltat_fast_cache", tmp_path / "xdg" / "ltat_fast"
    reported = [line for line in lines if line.startswith("cannot keep")]
    assert reported == [f"cannot keep decoded images in {folder}: File too large" for folder in folders]
    assert [path for folder in folders for path in folder.iterdir() if path.suffix != ".lock"] == []


def test_only_the_last_caches_of_a_dataset_are_kept(root, tmp_path):
    cache_folder = root / ".ltat_fast_cache"
    for size in (4, 5):
        load(root, image_size=size)
    os.utime(next(card for card in cache_folder.glob(f"*/{CARD}")), (1, 1))
    for size in (4, 5):  # used again, the smaller one first
        assert not load(root, image_size=size)[1]
        time.sleep(0.01)
    _, _, lines = load(root, image_size=6)
    assert lines[-1].startswith(f"removed decoded images of {root} at another size or from earlier files: 0.0 MiB")
    assert len(cache_folders(cache_folder)) == 2
    assert not load(root, image_size=5)[1]
    assert not load(root, image_size=6)[1]
    other = write_folder(tmp_path / "other", COUNTS)
    (other / ".ltat_fast_cache").symlink_to(cache_folder)  # another dataset in the same folder
    load(other)
    assert len(cache_folders(cache_folder)) == 3


def test_an_abandoned_decoding_is_removed(root):
    cache_folder = root / ".ltat_fast_cache"
    about = {"key": "k", "root": str(root)}
    for name, age in (("old", 8), ("new", 6)):
        blocks = OnDisk(_made(cache_folder) / f"{name}.part", about, {"train": 1}, (1, 1, 1))
        blocks.close()
        then = time.time() - 24 * 3600 * age
        os.utime(cache_folder / f"{name}.part" / "decoded.jsonl", (then, then))
    load(root)
    assert sorted(path.name for path in cache_folder.glob("*.part")) == ["new.part"]


def _made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def test_decoding_copies_no_array(tmp_path, monkeypatch):
    """The memory that a decoding needs does not grow with the images."""
    root = write_folder(tmp_path / "tree", {"a": (100, 1), "b": (100, 1)})
    tracemalloc.start()
    try:
        monkeypatch.setattr(decode, "BLOCK_IMAGES", 4)
        dataset = load(root, image_size=256)[0]
        assert tracemalloc.get_traced_memory()[1] < dataset.train.images.nbytes / 4
    finally:
        tracemalloc.stop()
