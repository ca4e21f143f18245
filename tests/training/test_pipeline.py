"""The stages of a run are built as its configuration says."""

import numpy as np
import pytest
import torch

from ltat_fast.attacks import AttackConfig
from ltat_fast.config import Config
from ltat_fast.methods import METHODS
from ltat_fast.methods.modifiers import OFF
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
        ("awp", {}, "auto", False),
        ("ltat", {}, "auto", False),
        ("ltat", {}, "fp32", True),
    ],
)
def test_the_precision_of_the_training_attack(method, options, given, fp32, data, tmp_path):
    config = config_of(method, tmp_path, attack_precision=given)
    assert pipeline.student_stage(config, METHODS[method](**options), data, HARDWARE).attacks_in_fp32 is fp32


MODIFIERS = {"awp": 0.005, "awp_from": 3, "ema": 0.9, "eps_balance": 0.3, "eps_warmup": 0.5}


def test_modifiers_are_built_as_configured(data, tmp_path):
    student = pipeline.student_stage(config_of("ltat", tmp_path, **MODIFIERS), METHODS["ltat"](), data, HARDWARE)
    awp, ema, budget = student.modifiers.awp, student.modifiers.ema, student.modifiers.budget
    assert (awp.gamma, awp.first_epoch, ema.decay, budget.warm_up_share) == (0.005, 3, 0.9, 0.5)
    counts = torch.tensor(data.counts, dtype=torch.float64)
    assert (counts * budget.share).sum() / counts.sum() == pytest.approx(1)
    assert budget.share[0] == pytest.approx(0.7)
    strengths = [student.step_arguments(epoch, 0) for epoch in (0, 1, 2, 6)]
    assert [s["awp"] for s in strengths] == [0, 0, 0.005, 0.005]
    assert [s["budget"] for s in strengths] == pytest.approx([0, 1 / 3.5, 2 / 3.5, 1])
    per_epoch = len(student.loader)
    since = per_epoch - -(-7 * per_epoch // 40)  # 2.5 % of the steps
    assert [s["ema"] for s in strengths[:2]] == [0, min(0.9, (1 + since) / (10 + since))]


def test_the_teacher_is_modified_if_wanted(data, tmp_path):
    plain = pipeline.teacher_or_stage(config_of("ltat", tmp_path, **MODIFIERS), "balanced", data, HARDWARE)
    assert plain.modifiers == OFF
    assert plain.trained is plain.model
    assert "modifiers" not in plain.card(1)
    config = config_of("ltat", tmp_path, modify_teacher=True, **MODIFIERS)
    stage = pipeline.teacher_or_stage(config, "balanced", data, HARDWARE)
    assert stage.card(1)["modifiers"] == MODIFIERS | {"modify_teacher": True}
    modified = stage.modifiers
    assert (modified.awp.gamma, modified.ema.decay) == (0.005, 0.9)
    assert modified.budget.share.tolist() == [1.0] * 10, "its images are balanced"
    robust = pipeline.teacher_or_stage(config, "robust", data, HARDWARE).modifiers
    assert robust.budget.share[0] == pytest.approx(0.7)


def test_the_best_epoch_is_selected_by_the_average(data, tmp_path):
    student = pipeline.student_stage(config_of("pgd-at", tmp_path, ema=0.9), METHODS["pgd-at"](), data, HARDWARE)
    with torch.no_grad():
        student.trained.fc.weight.zero_()
        student.trained.fc.bias.copy_(torch.arange(10.0))  # predicts the last class
    scores = pipeline.selection_by_pgd20(student, data, HARDWARE).evaluate()
    share = 100 * (data.test.labels == 9).double().mean().item()
    assert scores["test_clean"] == scores["test_pgd20"] == pytest.approx(share, abs=0.01)
    assert scores["test_tail_clean"] == 100


def test_the_student_learns_from_the_averaged_teacher(monkeypatch, tmp_path, data):
    monkeypatch.setattr(pipeline, "fit", lambda stage, hardware: stage.trained.fc.bias.data.fill_(3.0))
    monkeypatch.setattr(pipeline, "evaluate_model", lambda config, splits, images, model, *_: models.append(model))
    monkeypatch.setattr(pipeline.EvalFile, "save", lambda *args: None)
    models = []
    config = config_of("ltat", tmp_path, ema=0.9, modify_teacher=True)
    stage = pipeline.teacher_or_stage(config, "balanced", data, HARDWARE)
    teacher = pipeline.train_teacher(stage, data, HARDWARE)
    assert teacher is models[0] is stage.modifiers.ema.model
    assert teacher.fc.bias.tolist() == [3.0] * 10
    assert stage.model.fc.bias.tolist() != [3.0] * 10


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
