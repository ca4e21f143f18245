"""Every method: a short run from the command line on the digits, bf16 against float32, a captured step on a GPU."""

import json
import math

import pytest
import torch

from helpers import train_runs
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext, modifiers
from ltat_fast.models import build_model
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.runs.records import read_metrics
from ltat_fast.training.backend import disagreement
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

SHORT = ("--epochs", "1", "--teacher-epochs", "1", "--max-steps", "2", "--attack-steps", "2")
SHORT += ("--eval-attacks", "clean,pgd20", "--limit-eval", "50")
VARIANTS = [
    ("trades", "--awp", "0.005", "--ema", "0.9", "--eps-balance", "0.3", "--eps-warmup", "0.5"),
    ("ltat", "--awp", "0.005", "--ema", "0.9", "--eps-balance", "0.3", "--modify-teacher"),
    ("mart", "--balanced"),
    ("reat", "--tail-form", "pairwise"),
    ("ltat", "--label-smoothing", "0.1"),
]


@pytest.mark.parametrize("flags", [*((name,) for name in METHODS), *VARIANTS], ids=" ".join)
def test_a_short_run_has_finite_metrics_and_scores(flags, tmp_path):
    run = tmp_path / "run"
    assert train_runs.train("--method", *flags, "--out", str(run), *SHORT) == 0
    (record,) = read_metrics(run / "metrics.jsonl")
    assert record["steps"] == 2
    assert all(math.isfinite(value) for value in record.values())
    scores = json.loads((run / "eval.json").read_text())
    assert set(scores["last"]) == {"clean", "pgd20", "worst"}
    assert scores["last"]["pgd20"]["images"] == 50


COUNTS = torch.arange(100, 0, -10)


def trial(
    name: str, hardware: Hardware, backend: str = "eager", accumulate: int = 1, **settings
) -> tuple[TrainStep, tuple[torch.Tensor, float]]:
    """Return a training step of ``name`` on noise, and its adversarial examples and loss.

    settings: those of :func:`modifiers.build`.
    """
    torch.compiler.reset()  # each method recompiles the same functions, and Dynamo allows eight recompilations

    def network(method, seed):
        torch.manual_seed(seed)
        model = method.wrap_model(build_model("smallresnet", 10, in_channels=1), COUNTS)
        return allow_joint_calls(model.to(hardware.device, memory_format=torch.channels_last))

    method = METHODS[name]()
    model, teacher = network(method, 0), network(METHODS["pgd-at"](), 1)
    method.setup(MethodContext(COUNTS.to(hardware.device), frozen_twin(teacher, hardware)))
    attack = AttackConfig(0.1, 0.025, 3, method.noise)
    own = modifiers.build(method, model, COUNTS.to(hardware.device), **settings)
    optimizer = make_optimizer(model, 0.1, 0.9, 5e-4)
    step = TrainStep(model, method, optimizer, attack, hardware, backend, modifiers=own, accumulate=accumulate)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(32, 1, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)
    x = x.to(hardware.device).contiguous(memory_format=torch.channels_last)
    return step, step.trial(x, y.to(hardware.device))


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_in_bf16_is_close_to_the_loss_in_float32(name):
    device = torch.device("cpu")
    _, (_, loss) = trial(name, Hardware(device, torch.float32, ""))
    _, (_, in_bf16) = trial(name, Hardware(device, torch.bfloat16, ""))
    assert in_bf16 == pytest.approx(loss, rel=0.03)
    assert in_bf16 != loss


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method().needs_double_backward])
def test_a_captured_step_equals_the_eager_step(name):
    hardware = Hardware(torch.device("cuda"), torch.float32, "")
    _, eager = trial(name, hardware)
    step, captured = trial(name, hardware, "graph")
    assert disagreement(captured, eager, step) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ltat", "reat", "taet"])
def test_a_captured_step_in_micro_batches_equals_the_eager_step(name):
    hardware = Hardware(torch.device("cuda"), torch.float32, "")
    _, eager = trial(name, hardware, accumulate=4, awp=0.005)
    step, captured = trial(name, hardware, "graph", accumulate=4, awp=0.005)
    assert disagreement(captured, eager, step) == ""


@pytest.mark.gpu
def test_a_captured_step_with_all_modifiers_equals_the_eager_step():
    """Also in the averaged weights after a step with other strengths than those of the capture."""
    hardware, averages = Hardware(torch.device("cuda"), torch.float32, ""), []
    on = {"awp": 0.005, "ema": 0.9, "eps_balance": 0.3}
    (eager_step, eager), (step, captured) = trial("ltat", hardware, **on), trial("ltat", hardware, "graph", **on)
    assert disagreement(captured, eager, step) == ""
    x, y = torch.rand(32, 1, 8, 8, device="cuda"), torch.randint(10, (32,), device="cuda")
    for each in (eager_step, step):
        each(x, y, lr=0.01, progress=0.5, seed=1, awp=0.0, ema=0.5, budget=0.0)
        assert torch.equal(each.perturb(x, y), x)
        averages.append(each.modifiers.ema.model)
    for ours, theirs in zip(*(average.parameters() for average in averages), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
