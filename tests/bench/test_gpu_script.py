"""Dry runs of bench/gpu.sh on the CPU, in a copy of the project, as it arrives on a machine with a GPU."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAVELLING = ("bench", "csrc", "kernels", "ltat_fast", "tests", "setup.py", "pyproject.toml", "README.md", "docs")
REVISION = "0123456789"
LARGEST = 15 << 20


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without .git, without what is built, and without links."""
    folder = tmp_path_factory.mktemp("copy of it")

    def ignored(directory, names):
        links = {name for name in names if Path(directory, name).is_symlink()}
        return links | {name for name in names if name == "__pycache__" or name.endswith((".so", ".csv", ".png"))}

    for name in TRAVELLING:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)
    return folder


def run(copy: Path, command: str, out: Path, **variables: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    environment |= {"LTAT_GIT_REVISION": REVISION, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    script = ["bash", "bench/gpu.sh", command, str(out), "cpu"]
    return subprocess.run(script, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def check(ran: subprocess.CompletedProcess, out: Path, parts: tuple[str, ...]) -> str:
    """Check what every command promises. Return the summary."""
    log = (out / "log.txt").read_text()
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}{log[-5000:]}"
    summary = (out / "summary.md").read_text()
    for part in parts:
        assert f"| {part} | ok |" in summary
    files = list(out.iterdir())
    assert all(file.is_file() and file.stat().st_size <= LARGEST for file in files)
    assert len(files) <= 8, sorted(files)
    return summary


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_prove(copy, tmp_path):
    out = tmp_path / "out"
    parts = ("install without the extension", "smoke test", "captured step, ResNet-18 at 32", "operators")
    summary = check(run(copy, "prove", out), out, parts)
    assert "0 checks failed" in (out / "smoke.txt").read_text()
    assert [row["variant"] for row in rows(out / "step.csv")] == ["+ bf16", "reference", "+ channels_last"]
    assert {row["git"] for name in ("step", "convs", "ops") for row in rows(out / f"{name}.csv")} == {REVISION}
    assert "| count | batch | in_channels |" in summary
    assert "memory check of the operators | skipped: no GPU" in summary


@pytest.mark.slow
def test_tune(copy, tmp_path):
    out = tmp_path / "out"
    parts = ("all levers", "all levers, --search-all-convolutions", "all levers, PreActResNet-18 at 64")
    parts += ("streamed images",)
    check(run(copy, "tune", out), out, parts)
    variants = [row["variant"] for row in rows(out / "tune.csv")]
    assert variants == ["+ bf16", "+ bf16, search-all-convolutions", "+ bf16", "+ channels_last"]
    assert all(float(row["median_ms"]) > 0 for row in rows(out / "tune.csv"))


@pytest.mark.slow
def test_accuracy_on_an_image_folder_that_arrives_zipped(copy, tmp_path, image_tree):
    (copy / "carry" / "data").mkdir(parents=True)
    shutil.make_archive(str(copy / "carry" / "data" / "images"), "zip", image_tree.parent, image_tree.name)
    out = tmp_path / "out"
    # Images of 8x8 pixels, too few to hold some out.
    flags = "--arch smallresnet --batch-size 8 --teacher-batch-size 4 --precision fp32 --select-on test --alpha 1"
    try:
        ran = run(copy, "accuracy", out, LTAT_TRAIN_FLAGS=flags)
    finally:
        shutil.rmtree(copy / "carry")
    check(ran, out, ("unpacking of images.zip", "training, selection and evaluation", "AutoAttack on 20 images"))
    assert '"dataset": "imagefolder-lt"' in (out / "log.txt").read_text()
    assert '"autoattack"' in (out / "eval.json").read_text()
    assert (out / "best.safetensors.0").stat().st_size > 1000


@pytest.mark.slow
def test_accuracy_on_the_digits(copy, tmp_path):
    out = tmp_path / "out"
    check(run(copy, "accuracy", out), out, ("training, selection and evaluation", "AutoAttack on 20 images"))
    assert '"dataset": "digits-lt"' in (out / "log.txt").read_text()


@pytest.mark.parametrize("arguments", [[], ["prove"], ["prove", ""], ["other", "out"], ["prove", "out", "tpu"]])
def test_wrong_arguments_are_refused(arguments, tmp_path):
    (tmp_path / "bench").mkdir()
    script = shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")  # alone: there is nothing that it could run
    ran = subprocess.run(["bash", script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert ran.stderr == "usage: bench/gpu.sh prove|tune|accuracy OUTDIR [cuda|cpu]\n"
    assert ran.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["bench"]
