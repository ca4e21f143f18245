"""bench.smoke finds wrong operators and failing captures, and writes each line at once."""

import dataclasses

import pytest
import torch

from bench import smoke
from bench.smoke import Report, check_call, check_start, main, operator_calls
from bench.step import Problem

CPU = torch.device("cpu")
SMALL = "--device cpu --arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1"


def test_a_dry_run_passes_and_writes_what_it_prints(tmp_path, capfd):
    out = tmp_path / "smoke.txt"
    assert main([*SMALL.split(), "--out", str(out)]) == 0
    text = out.read_text()
    assert text.splitlines() == [line for line in capfd.readouterr().out.splitlines() if line in text]
    assert "FAILED" not in text
    assert text.count("ok      ") == 6 + 33 + 2  # starts, other calls of operators, captured step and profile
    assert "0 checks failed" in text
    assert "aten::convolution_backward" in text
    assert "wall time" in text


@pytest.mark.parametrize("name", ["pgd_step float32 contiguous", "igdm_loss bfloat16 kl"])
def test_a_wrong_operator_is_found(name):
    (call,) = (call for call in operator_calls() if call.name == name)
    assert "largest difference" in check_call(call, CPU)
    wrong = dataclasses.replace(call, run=lambda *inputs: call.run(*inputs) * 1.01)
    with pytest.raises(AssertionError):
        check_call(wrong, CPU)


def test_a_wrong_start_is_found(monkeypatch):
    check_start("uniform", torch.float32, CPU)
    ours = smoke.pgd_init
    monkeypatch.setattr(smoke, "pgd_init", lambda x, eps, *args, **kwargs: ours(x, 0.9 * eps, *args, **kwargs))
    with pytest.raises(AssertionError):
        check_start("uniform", torch.float32, CPU)


def test_a_failure_has_its_whole_traceback_with_the_first_cause(tmp_path, monkeypatch, capsys):
    """As a capture fails: what goes wrong inside is only the context of the error that leaves it."""

    def trial(step, x, y, seed=0):
        try:
            raise ValueError("the first cause")
        finally:
            raise RuntimeError("capture failed")

    monkeypatch.setattr("ltat_fast.training.step.TrainStep.trial", trial)
    path = tmp_path / "smoke.txt"
    report = Report(path)
    problem = Problem(CPU, "smallresnet", 8, 8, attack_steps=1)
    assert smoke.capture(report, problem) is None
    assert report.failures == 1
    text = path.read_text()
    assert "ValueError: the first cause" in text
    assert "RuntimeError: capture failed" in text
    assert main([*SMALL.split(), "--parts", "profile"]) == 1
    assert "wall time" not in capsys.readouterr().out
