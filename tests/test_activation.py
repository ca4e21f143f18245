"""A run with ``--activation silu``: training, resuming, evaluation, report, analysis, export, and as a teacher."""

import json

import pytest
import torch

from helpers import train_runs
from ltat_fast.models import build_model
from ltat_fast.runs.export import import_file
from ltat_fast.runs.weights import read_weights

SHORT = ("--epochs", "3", "--teacher-epochs", "1", "--attack-steps", "2", "--limit-eval", "50")
SHORT += ("--eval-attacks", "clean,pgd20", "--precision", "fp32")


@pytest.fixture(scope="module")
def silu_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("silu") / "run"
    assert train_runs.train("--method", "ltat", "--activation", "silu", "--out", str(out), *SHORT) == 0
    return out


def network(run, activation):
    tensors, card = read_weights(run / "checkpoints" / "last.safetensors")
    model = build_model("smallresnet", 10, in_channels=1, activation=activation)
    model.load_state_dict(tensors)
    return model.eval(), card


def test_both_stages_train_a_network_with_silu(silu_run):
    for stage in (silu_run, silu_run / "teacher"):
        assert network(stage, "silu")[1]["activation"] == "silu"


def test_resuming_with_another_activation_is_refused(silu_run, capsys):
    assert train_runs.train("--out", str(silu_run), "--resume", "--activation", "relu") == 2
    assert "was started with other settings: activation (silu -> relu)" in capsys.readouterr().err


def test_an_evaluation_gives_the_scores_of_the_run(silu_run):
    before = json.loads((silu_run / "eval.json").read_text())
    assert train_runs.status_of("evaluate", str(silu_run), "--limit-eval", "50", "--attacks", "clean", "--again") == 0
    after = json.loads((silu_run / "eval.json").read_text())
    assert after["last"]["clean"] == before["last"]["clean"]


def test_report_and_analysis(silu_run, tmp_path):
    assert train_runs.status_of("report", str(silu_run), "--html", str(tmp_path / "report.html")) == 0
    assert "silu" in (tmp_path / "report.html").read_text()
    assert train_runs.status_of("analyse", str(silu_run), "--parts", "alignment", "--limit", "20") == 0


def test_the_export_computes_silu(silu_run, tmp_path):
    assert train_runs.status_of("export", str(silu_run), "--out", str(tmp_path / "out")) == 0
    x = torch.rand(5, 1, 8, 8)
    exported = import_file(tmp_path / "out" / "model.py").load_model()
    with torch.no_grad():
        assert torch.equal(exported(x), network(silu_run, "silu")[0](x))
        assert not torch.allclose(exported(x), network(silu_run, "relu")[0](x), atol=1e-3)


def test_as_the_teacher_of_a_network_with_relu(silu_run, tmp_path):
    out = tmp_path / "student"
    flags = ("--method", "ard", "--teacher", str(silu_run), "--out", str(out), *SHORT)
    assert train_runs.train(*flags) == 0
    assert network(out, "relu")[1]["activation"] == "relu"
