"""A run knows its data and its teacher: it is not resumed with others, and results on others are not averaged."""

import json
import shutil

import pytest

from helpers import train_runs
from helpers.train_runs import FOLDER
from ltat_fast.runs.experiments import experiments
from ltat_fast.runs.weights import read_weights, write_weights

PGD_AT = (*FOLDER, "--method", "pgd-at")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def root(tmp_path):
    return train_runs.write_images(tmp_path / "tree")


def train(root, out, *flags):
    assert train_runs.train("--data-dir", str(root), "--out", str(out), *PGD_AT, *flags) == 0
    return out


def swap_classes(root):
    for split in ("train", "test"):
        (root / split / "ant").rename(root / split / "other")
        (root / split / "bee").rename(root / split / "ant")
        (root / split / "other").rename(root / split / "bee")


def rename_a_class(root):
    for split in ("train", "test"):
        (root / split / "cow").rename(root / split / "crow")


CHANGES = {
    "training images, training labels, test images": swap_classes,
    "class names": rename_a_class,
    "training images, training labels, selection of training images": lambda root: shutil.copy(
        root / "train" / "ant" / "1.png", root / "train" / "ant" / "new.png"
    ),
    "training images": lambda root: shutil.copy(root / "train" / "ant" / "1.png", root / "train" / "ant" / "2.png"),
    "test images": lambda root: shutil.copy(root / "test" / "ant" / "1.png", root / "test" / "ant" / "2.png"),
}


def test_a_run_is_not_resumed_on_other_data(root, tmp_path, capfd):
    run = train(root, tmp_path / "run", "--select-on", "test")
    files = {path: path.read_bytes() for path in run.glob("*.json")}
    for what, change in CHANGES.items():
        changed = shutil.copytree(root, tmp_path / "changed", ignore=shutil.ignore_patterns(".ltat_fast_cache"))
        change(changed)
        capfd.readouterr()
        assert train_runs.train("--out", str(run), "--resume", "--data-dir", str(changed)) == 2
        assert f"cannot resume {run}: since its start the {what} changed; restore" in capfd.readouterr().err
        shutil.rmtree(changed)
    assert {path: path.read_bytes() for path in run.glob("*.json")} == files
    moved = shutil.move(root, tmp_path / "moved")
    assert train_runs.train("--out", str(run), "--resume", "--data-dir", str(moved)) == 0


def test_a_run_is_not_resumed_with_another_teacher(root, tmp_path, capfd):
    teacher = train(root, tmp_path / "teacher", "--seed", "5")
    flags = ("--data-dir", str(root), *FOLDER, "--method", "ltat", "--teacher", str(teacher))
    assert train_runs.train("--out", str(tmp_path / "run"), *flags) == 0
    assert train_runs.train("--out", str(tmp_path / "run"), "--resume") == 0
    weights = teacher / "checkpoints" / "best.safetensors"
    tensors, card = read_weights(weights)
    for file in teacher.glob("checkpoints/*.safetensors"):
        write_weights(file, tensors | {"fc.bias": tensors["fc.bias"] + 1e-6}, card)
    capfd.readouterr()
    assert train_runs.train("--out", str(tmp_path / "run"), "--resume") == 2
    assert "since its start the teacher changed" in capfd.readouterr().err


def test_the_first_environment_stays_and_later_ones_are_added(root, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["first", "command"])
    run = train(root, tmp_path / "run")
    first = json.loads((run / "env.json").read_text())
    for number in (1, 2):
        monkeypatch.setattr("sys.argv", ["later", str(number)])
        assert train_runs.train("--out", str(run), "--resume") == 0
    content = json.loads((run / "env.json").read_text())
    later = content.pop("resumed")
    assert content == first
    assert content["command"] == "first command"
    assert [entry["command"] for entry in later] == ["later 1", "later 2"]
    assert {"date", "packages", "machine", "git"} <= later[0].keys()
    assert "data" not in later[0]


def test_runs_on_other_images_are_not_seeds_of_one_experiment(root, tmp_path, capfd):
    """The same numbers of images, and so the same selection; one training or one test image differs."""
    runs = [train(root, tmp_path / f"seed {seed}", "--seed", str(seed)) for seed in (0, 1)]
    assert [len(e.runs) for e in experiments(runs)] == [2]
    for seed, what in ((2, "training images"), (3, "test images")):
        changed = shutil.copytree(root, tmp_path / what)
        CHANGES[what](changed)
        runs.append(train(changed, tmp_path / f"seed {seed}", "--seed", str(seed)))
    found = experiments(runs)
    assert [len(e.runs) for e in found] == [2, 1, 1]
    assert len({e.label for e in found}) == 3
    assert all(e.label.startswith("pgd-at training_set=") for e in found)

    again = ("evaluate", str(runs[0]), "--data-dir", str(tmp_path / "test images"), "--attacks", "clean")
    assert train_runs.status_of(*again) == 2
    assert "eval.json has results on 2 different test sets" in capfd.readouterr().err
