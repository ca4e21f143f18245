"""The health of the attack gradient is measured right and changes nothing."""

import copy

import pytest
import torch
from torch import nn

from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.models import build_model
from ltat_fast.training.device import Hardware
from ltat_fast.training.precision import gradient_health
from ltat_fast.training.step import TrainStep, make_optimizer


def step_of(model: nn.Module, dtype: torch.dtype, method: str = "pgd-at") -> TrainStep:
    hardware = Hardware(torch.device("cpu"), dtype, "")
    optimizer = make_optimizer(model, 0.1, 0.9, 0.0)
    chosen = METHODS[method]()
    chosen.setup(MethodContext(torch.ones(10)))
    return TrainStep(model, chosen, optimizer, AttackConfig(noise=chosen.noise), hardware)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model("smallresnet", 10, in_channels=1)


class LeftHalf(nn.Module):
    """A linear classifier that does not see the right half of the image."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(x[..., :4].flatten(1))


def test_pixels_without_a_gradient_are_counted(batch):
    assert gradient_health(step_of(LeftHalf(), torch.float32), *batch)["zero_gradients"] == 50.0


def test_gradient_signs_in_bf16_are_compared_with_float32(batch):
    model = network()
    exact = gradient_health(step_of(model, torch.float32), *batch)
    assert exact.keys() == {"zero_gradients"}
    assert exact["zero_gradients"] < 1
    reduced = gradient_health(step_of(model, torch.bfloat16), *batch)
    assert 0 < reduced["sign_disagreement"] < 20


def test_the_gradient_of_trades_is_measured_away_from_the_image(batch):
    """At the image the gradient of the divergence is zero. Near it, in bf16, many signs depend on rounding."""
    model = network()
    assert gradient_health(step_of(model, torch.float32, "trades"), *batch)["zero_gradients"] < 1
    reduced, cross_entropy = (
        gradient_health(step_of(model, torch.bfloat16, method), *batch)["sign_disagreement"]
        for method in ("trades", "pgd-at")
    )
    assert 2 * cross_entropy < reduced < 45


def test_the_measurement_changes_no_state(batch):
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    gradient_health(step_of(model, torch.bfloat16), *batch)
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
