"""Too little memory or disk is said before anything is decoded."""

import re
import subprocess
import sys
import textwrap

import psutil
import pytest

from helpers.image_trees import write_folder
from helpers.small_disks import file_system
from ltat_fast.data import load_dataset, space
from ltat_fast.errors import UserError


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "tree", {"a": (6, 2), "b": (4, 2)})


def test_images_larger_than_the_memory_are_refused_before_decoding(root, tmp_path):
    """If no disk can hold them: both cache folders are files here."""
    (root / ".ltat_fast_cache").write_text("")
    (tmp_path / "xdg").write_text("")
    side = 8192  # 14 images of 192 MiB
    needed = 14 * 3 * side**2
    script = f"""
        import resource
        from pathlib import Path
        import psutil
        from ltat_fast.data import load_dataset

        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
        load_dataset("imagefolder-lt", Path({str(root)!r}), image_size={side})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert re.search(
        rf"these images need {space.gib(needed)}: no disk has room for them, and (0\.9|1\.0) GiB of memory is free; ",
        done.stderr,
    )
    assert "decoding" not in done.stdout


def test_the_smallest_limit_counts(tmp_path, monkeypatch):
    """The group of the process has no limit, the one above it has: 900 of 1000 bytes are used, 300 of them cached."""
    monkeypatch.setattr(space, "CGROUPS", tmp_path)
    monkeypatch.setattr(space, "OWN_CGROUP", tmp_path / "own")
    assert 1000 < space.free_memory() <= psutil.virtual_memory().total  # no control groups of version 2
    (tmp_path / "own").write_text("1:name=other:/x\n0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    limits = {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 5\ninactive_file 300\n"}
    for name, text in limits.items():
        (tmp_path / "job" / name).write_text(text)
    assert space.free_memory() == 400
    with pytest.raises(UserError, match=r"need 1\.0 MiB: .* and 0\.0 MiB of memory is free"):
        space.require_memory(2**20)
    (tmp_path / "job" / "memory.max").write_text("max\n")
    assert space.free_memory() > 1000


def test_limits_of_control_groups_of_version_1_count(tmp_path, monkeypatch):
    monkeypatch.setattr(space, "CGROUPS", tmp_path)
    monkeypatch.setattr(space, "OWN_CGROUP", tmp_path / "own")
    (tmp_path / "own").write_text("5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n")
    (tmp_path / "memory" / "job").mkdir(parents=True)
    files = {"limit_in_bytes": "5000\n", "usage_in_bytes": "4500\n", "stat": "cache 9\ntotal_inactive_file 100\n"}
    for name, text in files.items():
        (tmp_path / "memory" / "job" / f"memory.{name}").write_text(text)
    assert space.free_memory() == 600


def test_a_disk_that_is_too_small_is_said_before_decoding_and_the_next_one_is_used(tmp_path):
    with file_system(tmp_path / "small", "1m") as small:
        root = write_folder(small / "tree", {"a": (6, 2), "b": (4, 2)})
        lines = []
        load_dataset("imagefolder-lt", root, image_size=256, report=lines.append)
        assert lines[0].startswith(f"these images need 2.6 MiB, but the disk of {root / '.ltat_fast_cache'} has 0.")
        assert lines[0].endswith("MiB free: they are not kept there")
        assert lines[1].startswith("decoding 10 training and 4 test images")
        assert len(list((tmp_path / "xdg" / "ltat_fast").glob("*/cache.json"))) == 1
        again = []
        load_dataset("imagefolder-lt", root, image_size=256, report=again.append)
        assert again == []
