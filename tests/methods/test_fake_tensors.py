"""No method's training step waits for the device or leaves it: a CUDA graph could capture every one.

The steps run on fake tensors, which have shapes and no values, so that code that reads a value raises. With torch built
for CUDA they are fake CUDA tensors, without a GPU; with a CPU build they are fake CPU tensors, and the tests of leaving
the device cannot fail and are skipped.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._pytree import tree_leaves

from bench.fake_cuda import built_with_cuda, fake_device
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, Method, MethodContext, modifiers
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.trades import Trades
from ltat_fast.models import build_model
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

BATCH, CLASSES = 32, 10
ALL = {"awp": 0.005, "ema": 0.995, "eps_balance": 0.3, "eps_warmup": 0.5}
CASES = {
    **METHODS,
    "ltat with the class prior in its KL": lambda: Ltat(kl_weight=1.0, kl_prior=True),
    "pgd-at with igdm": lambda: PgdAt(igdm_alpha=5.0),
    "trades with igdm": lambda: Trades(igdm_alpha=5.0),
}


def operators_of_a_step(method: Method, label_smoothing: float = 0.0, accumulate: int = 1, **settings) -> list[tuple]:
    """(operator, arguments, result) of each operator of one step on fake tensors, in order.

    settings: those of :func:`modifiers.build`.
    """
    with fake_device() as fake:
        hardware = Hardware(fake.device, torch.bfloat16, "test")
        counts = torch.arange(CLASSES, 0, -1)

        def network(wrapper):
            model = wrapper.wrap_model(build_model("smallresnet", CLASSES, in_channels=1), counts)
            return model.to(fake.device, memory_format=torch.channels_last)

        model, teacher = network(method), network(PgdAt())
        counts = counts.to(fake.device)
        method.setup(MethodContext(counts, frozen_twin(teacher, hardware), label_smoothing))
        attack = AttackConfig(0.1, 0.025, 2, method.noise)
        own = modifiers.build(method, model, counts, **settings)
        optimizer = make_optimizer(model, 0.1, 0.9, 5e-4)
        step = TrainStep(model, method, optimizer, attack, hardware, modifiers=own, accumulate=accumulate)
        x = torch.rand(BATCH, 1, 8, 8).to(fake.device, memory_format=torch.channels_last)
        y = torch.randint(CLASSES, (BATCH,)).to(fake.device)
        seen = []
        with fake.observing(lambda *operator: seen.append(operator)):
            step(x, y, lr=0.1, progress=0.5, seed=0, **own.strengths(3, 2, 10, 20))
    return seen


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def departures(operators: list[tuple]) -> list[str]:
    """Names of the operators that turn a tensor on the device into one on the CPU."""
    return [
        str(operator)
        for operator, arguments, result in operators
        if any(t.device.type == "cuda" for t in tensors(arguments)) and any(t.is_cpu for t in tensors(result))
    ]


@pytest.mark.parametrize("settings", [{}, ALL], ids=["alone", "modified"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_never_reads_the_device_and_never_leaves_it(name, settings):
    operators = operators_of_a_step(CASES[name](), **settings)
    assert sum(len(tensors(arguments)) > 0 for _, arguments, _ in operators) > 100, "the step did not run"
    assert departures(operators) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case().smooths_labels])
def test_neither_does_a_step_with_smoothed_labels(name):
    assert departures(operators_of_a_step(CASES[name](), label_smoothing=0.1)) == []


@pytest.mark.parametrize("name", ["ltat", "rslad", "reat", "taet"])
def test_neither_does_a_step_in_micro_batches(name):
    assert departures(operators_of_a_step(CASES[name](), accumulate=4, **ALL)) == []


def test_a_read_is_found():
    class Reading(PgdAt):
        def loss(self, model, x, x_adv, y, progress):
            loss, parts = super().loss(model, x, x_adv, y, progress)
            return loss * (2.0 if loss > 1 else 1.0), parts

    with pytest.raises(DataDependentOutputException):
        operators_of_a_step(Reading())


def test_a_tensor_that_leaves_the_device_is_found():
    if not built_with_cuda():
        pytest.skip("a CPU build of torch has no fake CUDA tensors")

    class Leaving(PgdAt):
        def loss(self, model, x, x_adv, y, progress):
            loss, _ = super().loss(model, x, x_adv, y, progress)
            return loss, {"ce": loss.detach().cpu().to(loss.device)}

    assert departures(operators_of_a_step(Leaving())) == ["aten._to_copy.default"]
