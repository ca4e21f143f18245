"""Training on images that stay on the disk: bit-equal to training on resident images, also after an interruption."""

import json

import numpy as np
import pytest
from PIL import Image

from helpers import train_runs
from helpers.train_runs import FOLDER
from ltat_fast.data import space

LARGE = ("--image-size", "8", "--store-size", "12", "--crop", "resized", "--augment", "randaugment")
LARGE += ("--select-on", "heldout", "--heldout", "0.3", "--eval-every", "1", "--method", "ltat", "--epochs", "2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def root(tmp_path):
    """An image folder with images of 8 and, for larger ones to be resized, of 16 x 20 pixels."""
    root = train_runs.write_images(tmp_path / "tree")
    for path in root.glob("train/*/?.png"):
        Image.fromarray(np.asarray(Image.open(path)).repeat(2, 0).repeat(2, 1)).resize((16, 20)).save(path)
    return root


def test_a_streamed_run_equals_a_resident_one_also_if_it_moves(root, tmp_path, capfd):
    flags = ("--data-dir", str(root), *FOLDER, *LARGE)
    flags = tuple("6" if flag == "3" else flag for flag in flags)  # --max-steps: into the second epoch
    assert train_runs.train("--out", str(tmp_path / "device"), *flags, "--data-placement", "device") == 0
    assert "the images stay in memory" in capfd.readouterr().out
    assert train_runs.train("--out", str(tmp_path / "stream"), *flags, "--data-placement", "stream") == 0
    said = capfd.readouterr().out
    assert "are streamed; " in said
    assert "decoding" not in said
    train_runs.assert_same(tmp_path / "stream", tmp_path / "device")

    moved = str(tmp_path / "moved")
    stopped = train_runs.start_signalled(
        "--out", moved, *flags, "--data-placement", "stream", LTAT_SIGNAL="SIGKILL 2 rename checkpoints/resume"
    )
    train_runs.finish(stopped, -9)
    assert train_runs.train("--out", moved, "--resume", "--data-placement", "device") == 0
    train_runs.assert_same(tmp_path / "moved", tmp_path / "device")
    assert train_runs.status_of("analyse", moved, "--parts", "classwise", "--limit", "6") == 0
    assert train_runs.status_of("report", moved, "--html", str(tmp_path / "report.html")) == 0


def test_auto_streams_what_fills_more_than_half_of_the_memory(root, tmp_path, capfd, monkeypatch):
    flags = ("--data-dir", str(root), *FOLDER, "--image-size", "8", "--method", "pgd-at")
    needed = (44 + 15) * 3 * 8 * 8
    for free, what in ((2 * needed, "the images stay in memory"), (2 * needed - 1, "are streamed")):
        monkeypatch.setattr(space, "free_memory", lambda free=free: free)
        assert train_runs.train("--out", str(tmp_path / what), *flags) == 0
        assert what in capfd.readouterr().out
    monkeypatch.setattr(space, "free_memory", lambda: needed - 1)
    assert train_runs.train("--out", str(tmp_path / "no"), *flags, "--data-placement", "device") == 2
    assert "--data-placement device: the images need 0.0 MiB, and 0.0 MiB is free in memory" in capfd.readouterr().err
    config = json.loads((tmp_path / "are streamed" / "config.json").read_text())
    assert config["data_placement"] == "auto"


def test_resized_crops_need_square_images(tmp_path, capfd):
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (6, 5), (i, i, i)).save(tmp_path / "tree" / split / name / f"{i}.png")
    flags = ("--data-dir", str(tmp_path / "tree"), *FOLDER, "--method", "pgd-at", "--out", str(tmp_path / "run"))
    assert train_runs.train(*flags, "--crop", "resized") == 2
    assert "--crop resized makes square images, and these have 6x5: set --image-size" in capfd.readouterr().err
