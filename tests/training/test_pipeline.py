"""The stages of a run are built as its configuration says."""

import numpy as np
import pytest
import torch

from ltat_fast.attacks import AttackConfig
from ltat_fast.config import Config
from ltat_fast.methods import METHODS
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.runs.splits import load_splits
from ltat_fast.training import pipeline
from ltat_fast.training.device import Hardware
from ltat_fast.training.stage import Stage

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "")
SETTINGS = {"epochs": 7, "teacher_epochs": 5, "batch_size": 48, "teacher_batch_size": 24, "lr": 0.07, "momentum": 0.8}
SETTINGS |= {"weight_decay": 3e-4, "lr_schedule": "0.5,0.8", "eps": "0.2", "step_size": "0.03", "attack_steps": 3}
SETTINGS |= {"seed": 11, "gamma": 2.0, "max_steps": 9, "save_minutes": 4.0, "on_nan": "rollback", "compile": "none"}


def config_of(method: str, out, **changes) -> Config:
    return Config(method=method, out=out, device="cpu", precision="fp32", **SETTINGS | changes)


@pytest.fixture(scope="module")
def data():
    return load_splits(Config(), HARDWARE.device)


def assert_as_configured(stage: Stage, noise: str) -> None:
    assert stage.attack == AttackConfig(eps=0.2, step_size=0.03, steps=3, noise=noise)
    assert {name: getattr(stage.config, name) for name in SETTINGS} == SETTINGS
    last = (stage.epochs - 1, len(stage.loader) - 1)
    assert stage.step_arguments(*last)["lr"] == pytest.approx(0.07 * 0.1**2)
    assert stage.step_arguments(*last)["progress"] == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_built_as_configured(method, data, tmp_path):
    config = config_of(method, tmp_path)
    student = pipeline.student_stage(config, METHODS[method](), data, HARDWARE)
    assert_as_configured(student, METHODS[method]().noise)
    assert (student.epochs, student.loader.batch_size, student.folder) == (7, 48, tmp_path)
    assert student.loader.indices.tolist() == list(range(461))
    assert type(student.method) is METHODS[method]
    selection = pipeline.selection_by_pgd20(student, data, HARDWARE)
    assert [epoch for epoch in range(7) if selection.after(epoch)] == [4, 5, 6], "from the first drop on"
    assert selection.by == "test_pgd20"


@pytest.mark.parametrize(
    ("method", "kind", "images"), [("ltat", PgdAt, 22 * 10), ("ard", PgdAt, 461), ("igd", Natural, 461)]
)
def test_the_teacher_is_built_as_configured(method, kind, images, data, tmp_path):
    """The teacher of LTAT sees 22 images per class, twice the smallest class. The others see all images."""
    config, kind_of_teacher = config_of(method, tmp_path), METHODS[method].teacher
    teacher = pipeline.teacher_or_stage(config, kind_of_teacher, data, HARDWARE)
    assert_as_configured(teacher, kind().noise)
    assert (teacher.epochs, teacher.loader.batch_size, teacher.folder) == (5, 24, tmp_path / "teacher")
    assert type(teacher.method) is kind
    assert len(teacher.loader.indices) == images
    seen = np.bincount(data.train.labels[teacher.loader.indices], minlength=10).tolist()
    assert seen == ([22] * 10 if images == 220 else data.counts)


def test_teacher_and_student_have_different_seeds(data, tmp_path):
    config = config_of("ltat", tmp_path)
    student = pipeline.student_stage(config, METHODS["ltat"](), data, HARDWARE)
    teacher = pipeline.teacher_or_stage(config, "balanced", data, HARDWARE)
    first = [next(stage.model.parameters()) for stage in (student, teacher)]
    assert not torch.equal(*first)
    assert student.loader.seed != teacher.loader.seed
    again = pipeline.student_stage(config, METHODS["ltat"](), data, HARDWARE)
    assert torch.equal(first[0], next(again.model.parameters()))


@pytest.mark.parametrize(
    ("method", "options", "given", "fp32"),
    [
        ("trades", {}, "auto", True),
        ("trades", {}, "same", False),
        ("awp", {"awp_base": "trades"}, "auto", True),
        ("awp", {}, "auto", False),
        ("ltat", {}, "auto", False),
        ("ltat", {}, "fp32", True),
    ],
)
def test_the_precision_of_the_training_attack(method, options, given, fp32, data, tmp_path):
    config = config_of(method, tmp_path, attack_precision=given)
    assert pipeline.student_stage(config, METHODS[method](**options), data, HARDWARE).attacks_in_fp32 is fp32


def test_the_method_gets_the_class_counts_and_the_teacher(monkeypatch, tmp_path, data):
    trained = []
    monkeypatch.setattr(pipeline, "fit", lambda stage, hardware: trained.append(stage))
    monkeypatch.setattr(pipeline, "evaluate_model", lambda *args: {})
    monkeypatch.setattr(pipeline, "evaluate_run", lambda *args: None)
    monkeypatch.setattr(pipeline.tables, "render", lambda runs: "")
    method = METHODS["ltat"]()
    pipeline.train(config_of("ltat", tmp_path, label_smoothing=0.2), method, HARDWARE)
    teacher, student = trained
    assert (teacher.name, student.name) == ("teacher", "student")
    assert student.method is method
    assert method.context.class_counts.tolist() == data.counts
    assert (teacher.method.context.label_smoothing, method.context.label_smoothing) == (0.0, 0.2)
    x = data.test.images[:4] / 255
    torch.testing.assert_close(method.context.teacher(x), teacher.model.eval()(x), rtol=1e-4, atol=1e-4)
