"""The cache hits when it may, misses when it must, and never hands out half of a file."""

import os
import resource
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.image_trees import write_folder, write_image
from ltat_fast.data import load_dataset
from ltat_fast.data.cache import read_cache, write_cache

COUNTS = {"a": (6, 2), "b": (4, 2)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "tree", COUNTS)


def load(root, **options):
    """(dataset, whether it was decoded, all lines reported)"""
    lines = []
    dataset = load_dataset("imagefolder-lt", root, report=lines.append, **options)
    return dataset, any("decoding" in line for line in lines), lines


def cache_files(folder):
    return sorted(folder.glob("*.safetensors"))


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


def test_second_start_maps_what_the_first_decoded(root):
    first, decoded, _ = load(root)
    assert decoded
    second, decoded, lines = load(root)
    assert not decoded
    assert lines == []
    assert same(first, second)
    assert isinstance(second.train.images.base, np.memmap) or isinstance(second.train.images, np.memmap)
    assert not second.train.images.flags.writeable
    # and anyone's safetensors reads the file
    stored = load_file(cache_files(root / ".ltat_fast_cache")[0])
    assert np.array_equal(stored["test.images"], first.test.images)
    assert np.array_equal(stored["train.labels"], first.train.labels)


def test_what_changes_the_arrays_misses(root):
    load(root)
    assert load(root, image_size=6)[1]
    assert not load(root, image_size=6)[1]
    write_image(root / "train" / "a" / "0.png", 200)  # same name, same size on disk or not: a new modification time
    dataset, decoded, _ = load(root)
    assert decoded
    assert dataset.train.images[0].max() == 200
    (root / "train" / "a" / "5.png").rename(root / "train" / "b" / "9.png")
    dataset, decoded, _ = load(root)
    assert decoded
    assert np.bincount(dataset.train.labels).tolist() == [5, 5]
    os.utime(root / "test" / "b" / "0.png", ns=(1, 1))
    assert load(root)[1]


def test_damage_is_decoded_again(root):
    whole, _, _ = load(root)
    (path,) = cache_files(root / ".ltat_fast_cache")
    content = path.read_bytes()
    key = path.stem
    assert read_cache(path, key) is not None
    assert read_cache(path, "another") is None
    for length in (0, 4, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert read_cache(path, key) is None
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        assert read_cache(path, key) is None, position
    headers = (b"[" * 100_000, b"{}", b'{"__metadata__": 1}', b'{"__metadata__": {"key": "%b", "crc32": "1e9"}}')
    for header in headers:  # an endless list, no card, a card that is none, a checksum that is none
        header = header.replace(b"%b", key.encode())
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        assert read_cache(path, key) is None
    path.write_bytes(b"\xff" * 8 + content[8:])  # a header of 2^64 - 1 bytes
    assert read_cache(path, key) is None
    path.write_bytes(content[: len(content) // 2])
    again, decoded, _ = load(root)
    assert decoded
    assert same(whole, again)
    assert path.read_bytes() == content


def test_leftovers_of_a_killed_writer_do_no_harm(root):
    """A process killed while it writes leaves its part file; the next one starts over and finishes."""
    script = f"""
        import os, signal
        from pathlib import Path
        from ltat_fast.data import cache, load_dataset

        cache.os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)
        load_dataset("imagefolder-lt", Path({str(root)!r}))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert cache_files(root / ".ltat_fast_cache") == []
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
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("decoding" in output for output in outputs) == 1
    assert outputs[0].split()[-1] == outputs[1].split()[-1]
    assert len(cache_files(root / ".ltat_fast_cache")) == 1


def test_an_unwritable_place_is_passed_over(root, tmp_path):
    (root / ".ltat_fast_cache").write_text("a file where the folder should be")
    _, decoded, lines = load(root)
    assert decoded
    assert any("cannot keep decoded images in" in line for line in lines)
    assert len(cache_files(tmp_path / "xdg" / "ltat_fast")) == 1
    assert not load(root)[1]
    (tmp_path / "file").write_text("")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path / "file")
    _, decoded, lines = load(root)
    assert decoded
    assert sum("cannot keep" in line for line in lines) == 2


def test_a_given_cache_folder_is_used(root, tmp_path):
    load(root, cache_dir=tmp_path / "mine")
    assert len(cache_files(tmp_path / "mine")) == 1
    assert not (root / ".ltat_fast_cache").exists()


def test_a_full_disk_leaves_no_file(tmp_path):
    """A limit on the size of files stands in for the full disk: the same error path, from the kernel."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_cache(tmp_path / "x.safetensors", "x", {"train.images": np.zeros(100_000, np.uint8)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_write_then_read(tmp_path):
    arrays = {"l": np.arange(5, dtype=np.int64), "i": np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2)}
    write_cache(tmp_path / "k.safetensors", "k", arrays)
    read = read_cache(tmp_path / "k.safetensors", "k")
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert np.array_equal(read[name], array)
        assert read[name].dtype == array.dtype
