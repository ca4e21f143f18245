"""The full-precision head: the replacement of linear layers in networks of other packages."""

import copy

import pytest
import torch
from torch import nn

from ltat_fast.models.classifier import FullPrecisionLinear, with_float32_head
from ltat_fast.models.frozen import FrozenTwin

CLASSES = 5


class Foreign(nn.Module):
    """A network with a hidden layer, a head, and the parts given by keyword."""

    def __init__(self, **parts):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU())
        self.head = nn.Linear(7, CLASSES)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.fixture
def x():
    return torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def test_the_head_shares_its_parameters_and_computes_in_float32(x):
    torch.manual_seed(0)
    model = Foreign().eval()
    expected, parameters = model(x), dict(model.named_parameters())
    assert with_float32_head(model, CLASSES) is model
    assert type(model.head) is FullPrecisionLinear
    assert type(model.body[1]) is nn.Linear
    assert not model.head.training
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.float32
    twin = FrozenTwin(model, dtype=torch.bfloat16)
    assert twin.net.head.weight.dtype == torch.float32
    assert twin.net.body[1].weight.dtype == torch.bfloat16
    model(x).sum().backward()
    assert parameters["head.weight"].grad is not None


def test_a_model_that_is_itself_a_linear_layer():
    model = nn.Linear(7, CLASSES, bias=False).double()
    head = with_float32_head(model, CLASSES)
    assert type(head) is FullPrecisionLinear
    assert head.weight is model.weight
    assert head.bias is None
    assert with_float32_head(model, CLASSES + 1) is model
    assert with_float32_head(head, CLASSES) is head


def test_a_head_with_two_names_is_replaced_under_both(x):
    shared = nn.Linear(7, CLASSES)
    model = Foreign(head=shared, extra=nn.ModuleList([shared]))
    with_float32_head(model, CLASSES)
    assert type(model.head) is type(model.extra[0]) is FullPrecisionLinear
    assert model.head.weight is model.extra[0].weight is shared.weight


def test_other_layers_are_not_replaced(x):
    hooked = nn.Linear(7, CLASSES)
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    derived = nn.utils.parametrizations.weight_norm(nn.Linear(7, CLASSES))
    for head in (hooked, derived):
        model = Foreign(head=head)
        before = copy.deepcopy(model)(x)
        assert with_float32_head(model, CLASSES).head is head
        assert torch.equal(model(x), before)
