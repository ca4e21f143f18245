"""Precision and threads on a CPU: measured where the user left them open, kept on resume."""

import json
import os
from pathlib import Path

import pytest
import torch

from helpers.toy_networks import images, labels, small_net
from helpers.toy_stage import stage
from ltat_fast.training import tune
from ltat_fast.training.device import Hardware

CPU = torch.device("cpu")
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def machine(monkeypatch):
    """A CPU with bf16 and four threads, on which each choice takes a given time. Nothing is really measured."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(tune, "cpu_has_bf16", lambda: True)
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    times = {(BF16, 4): 10.0, (BF16, 1): 10.0, (FP32, 4): 10.0, (FP32, 1): 10.0}
    monkeypatch.setattr(tune, "_measure", lambda candidates, *_: {choice: times[choice] for choice in candidates})
    return times


def choose(folder: Path, **settings) -> tuple[torch.dtype, int]:
    hardware = tune.choose_for_cpu(stage(folder, **settings), Hardware(CPU, BF16, "default"))
    return hardware.dtype, torch.get_num_threads()


def test_the_fastest_choice_wins(machine, tmp_path):
    machine[FP32, 1] = 3.0
    assert choose(tmp_path) == (FP32, 1)


def test_the_default_stays_unless_another_is_clearly_faster(machine, tmp_path):
    machine[FP32, 1] = 9.5
    assert choose(tmp_path) == (BF16, 4)


def test_what_the_user_sets_is_not_measured(machine, tmp_path, monkeypatch):
    machine.update({(FP32, 1): 1.0, (BF16, 1): 2.0, (FP32, 4): 3.0})
    assert choose(tmp_path, precision="bf16") == (BF16, 1)
    torch.set_num_threads(4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose(tmp_path) == (FP32, 4)
    assert choose(tmp_path, precision="bf16") == (BF16, 4)


def test_a_resumed_run_keeps_its_choice(machine, tmp_path):
    machine[FP32, 1] = 1.0
    (tmp_path / "env.json").write_text(json.dumps({"precision": "float32", "threads": 4}))
    assert choose(tmp_path, resume=True) == (FP32, 4)
    assert choose(tmp_path) == (FP32, 1)


def test_a_choice_that_this_cpu_does_not_have_is_measured_again(machine, tmp_path):
    machine[FP32, 1] = 1.0
    (tmp_path / "env.json").write_text(json.dumps({"precision": "float32", "threads": 64}))
    assert choose(tmp_path, resume=True) == (FP32, 1)


def test_a_resumed_run_keeps_its_threads_whatever_the_environment_says(machine, tmp_path, monkeypatch):
    """A study sets OMP_NUM_THREADS, and perhaps to another number when it is started again."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    (tmp_path / "env.json").write_text(json.dumps({"precision": "bfloat16", "threads": 2}))
    assert choose(tmp_path, resume=True) == (BF16, 2)
    torch.set_num_threads(4)
    assert choose(tmp_path, resume=True, precision="bf16") == (BF16, 2)
    torch.set_num_threads(4)
    assert choose(tmp_path) == (BF16, 4)


def test_the_real_measurement_restores_the_threads(monkeypatch):
    before = torch.get_num_threads()
    candidates = [(FP32, 1), (FP32, 2)]
    times = tune._measure(candidates, small_net().to(memory_format=torch.channels_last), images(), labels())
    assert list(times) == candidates
    assert all(seconds > 0 for seconds in times.values())
    assert torch.get_num_threads() == before
