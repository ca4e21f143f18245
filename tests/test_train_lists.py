"""Training on lists of images of many sizes, with a validation split, through the preset of ImageNet-LT."""

import json
import sys

import numpy as np
import pytest

from helpers import train_runs
from helpers.image_trees import write_folder, write_image_lists
from ltat_fast.data import index_hash
from ltat_fast.runs import tables
from ltat_fast.runs.records import read_metrics

SIZES = ((40, 30), (33, 33), (20, 50), (64, 48))
SHOTS = ("many_shot", "medium_shot", "few_shot")
QUICK = ("--arch", "smallresnet", "--batch-size", "8", "--teacher-batch-size", "4", "--max-steps", "2")
QUICK += ("--precision", "fp32", "--attack-steps", "1", "--eval-attacks", "clean,pgd20")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def train(root, out, *flags):
    assert train_runs.train("--data-dir", str(root), "--out", str(out), *QUICK, *flags) == 0
    return [json.loads((out / f"{name}.json").read_text()) for name in ("config", "env", "eval")]


@pytest.mark.parametrize(
    ("many", "medium", "few"),
    [((2, 110), (8, 30), (90, 6)), pytest.param((20, 130), (30, 50), (50, 18), marks=pytest.mark.slow)],
    ids=["1,000 images", "5,000 images"],
)
def test_the_preset_of_imagenet_lt_by_many_medium_and_few(tmp_path, capfd, many, medium, few):
    groups = dict(zip(SHOTS, (many, medium, few), strict=True))
    counts = [images for classes, images in groups.values() for _ in range(classes)]
    root = write_image_lists(tmp_path / "tree", counts, SIZES)
    damaged = root / "train" / "class 0" / "7.JPEG"
    damaged.write_bytes(damaged.read_bytes()[:100])
    flags = ("--dataset", "imagenet-lt", "--image-size", "16", "--method", "pgd-at")
    assert train_runs.train("--data-dir", str(root), "--out", str(tmp_path / "stopped"), *QUICK, *flags) == 2
    assert f"cannot decode {damaged}" in capfd.readouterr().err
    config, env, evaluation = train(root, tmp_path / "run", *flags, "--bad-images", "skip")
    said = capfd.readouterr().out

    assert (config["eps"], config["step_size"], config["imbalance_ratio"]) == ("4/255", "1/255", None)
    assert (config["select_on"], env["selected_on"]) == ("val", "val")
    assert "the validation split (100 images) selects the best epoch" in said
    assert f"100 classes and {sum(counts):,} training images; ImageNet-LT has 1,000 and 115,846" in said
    assert "left out 1 bad images: train/class 0/7.JPEG" in said
    assert env["left_out_images"] == ["train/class 0/7.JPEG"]
    assert env["class_counts"] == [counts[0] - 1, *counts[1:]]
    assert env["index_hash"] != index_hash(np.arange(sum(counts) - 1))
    assert "val_pgd20" in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    for which in ("best", "last"):
        for attack in ("clean", "pgd20"):
            result = evaluation[which][attack]
            assert {"head", "medium", "tail"} < result.keys()
            first = 0
            for name, (classes, _) in groups.items():
                own = result["per_class"][first : first + classes]
                assert result[name] == pytest.approx(np.mean(own)), name
                first += classes
    table = tables.render([tmp_path / "run"])
    assert all(heading in table for heading in ("Many-Clean", "Med-PGD", "Few-PGD"))
    assert "Best epoch by PGD-20 on the validation split." in table


def test_lists_without_a_validation_split_select_on_the_test_images(tmp_path, capfd):
    root = write_image_lists(tmp_path / "tree", [12, 8, 6], SIZES, test=3, val=None)
    flags = ("--dataset", "imagelist-lt", "--image-size", "8", "--method", "pgd-at")
    config, env, _ = train(root, tmp_path / "run", *flags)
    assert (config["select_on"], env["selected_on"]) == ("test", "test")
    assert train_runs.train("--data-dir", str(root), "--out", str(tmp_path / "b"), *flags, "--select-on", "val") == 2
    assert "--select-on val: imagelist-lt has no validation split beside its test split" in capfd.readouterr().err


def test_a_folder_with_val_beside_test(tmp_path, capfd):
    counts = {"ant": (12, 3), "bee": (8, 2)}
    root = write_folder(write_folder(tmp_path / "tree", counts, size=8), {"ant": (0, 4)}, test="val", size=8)
    flags = ("--dataset", "imagefolder-lt", "--method", "pgd-at")
    config, _, evaluation = train(root, tmp_path / "run", *flags)
    assert "the validation split (4 images) selects the best epoch" in capfd.readouterr().out
    assert config["select_on"] == "val"
    assert "val_pgd20" in read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert evaluation["best"]["clean"]["images"] == 5
    assert not set(SHOTS) & evaluation["best"]["clean"].keys()
    assert train_runs.train("--out", str(tmp_path / "run"), "--resume") == 0

    config, _, _ = train(root, tmp_path / "on test", *flags, "--select-on", "test")
    assert "the validation split (4 images) is not used, because of --select-on test" in capfd.readouterr().out
    assert config["select_on"] == "test"


def test_parquet_without_pyarrow_is_one_sentence(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    flags = ("--dataset", "parquet-lt", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"))
    assert train_runs.train(*flags, *QUICK) == 2
    assert "parquet-lt needs pyarrow: pip install pyarrow" in capfd.readouterr().err
