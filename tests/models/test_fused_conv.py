"""Convolution, residual and ReLU in one call: values and gradients, in networks, compiled; the padded stem."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ltat_fast.models import ARCHS, build_model
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.fused_conv import FusedConvReLU, conv_relu, conv_relu_ref, is_supported

GEOMETRIES = [
    ([1, 1], [1, 1], [1, 1], 1),
    ([2, 2], [1, 1], [1, 1], 1),
    ([1, 1], [0, 0], [1, 1], 2),
    ([1, 1], [2, 2], [2, 2], 1),
]


OPTIONS = [{"fuse_relu": True}, {"pad_stem": True}, {"fuse_relu": True, "pad_stem": True}]


def tensors(geometry, dtype, with_bias=True, with_residual=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 6, 9, 7, generator=generator)
    weight = torch.randn(4, 6 // geometry[3], 3, 3, generator=generator)
    bias = torch.randn(4, generator=generator) if with_bias else None
    shape = F.conv2d(x, weight, None, *geometry).shape
    residual = torch.randn(shape, generator=generator) if with_residual else None

    def prepare(t):
        return None if t is None else t.to(dtype)

    return [prepare(t) for t in (x, weight, bias, residual)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("with_bias", "with_residual"), list(itertools.product([False, True], repeat=2)))
def test_values_and_gradients_against_float64(geometry, with_bias, with_residual, channels_last):
    x, weight, bias, residual = tensors(geometry, torch.float32, with_bias, with_residual)
    if channels_last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    exact = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    inputs = [t for t in (x, residual) if t is not None]
    exact_inputs = [t for t in (exact[0], exact[3]) if t is not None]
    for t in (*inputs, *exact_inputs):
        t.requires_grad_()
    conv = nn.Conv2d(6, 4, 3, *geometry[:3], groups=geometry[3], bias=with_bias).requires_grad_(False)
    conv.weight.data = weight
    if with_bias:
        conv.bias.data = bias
    ours, registered = FusedConvReLU(conv)(x, residual), conv_relu(x, weight, bias, residual, *geometry)
    theirs = conv_relu_ref(*exact, *geometry)
    torch.testing.assert_close(ours, registered, rtol=0, atol=0)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(theirs, exact_inputs, grad.double())
    for out in (ours, registered):
        for found, wanted in zip(torch.autograd.grad(out, inputs, grad), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_registered_operator():
    """Its fake and its schema; the gradient is tested above."""
    for with_residual in (False, True):
        x, weight, bias, residual = tensors(GEOMETRIES[0], torch.float32, with_residual=with_residual)
        operator = torch.ops.ltat.conv_relu.default
        torch.library.opcheck(operator, (x, weight, bias, residual, *GEOMETRIES[0]))


def test_a_weight_that_wants_a_gradient_is_refused():
    x, weight, bias, _ = tensors(GEOMETRIES[0], torch.float32)
    with pytest.raises(ValueError, match="no gradient for weight and bias"):
        conv_relu(x, weight.requires_grad_(), bias, None, *GEOMETRIES[0])


def trained(arch: str, activation: str = "relu") -> nn.Module:
    """A network whose batch norms have seen images."""
    torch.manual_seed(0)
    model = build_model(arch, 10, activation=activation).train()
    with torch.no_grad():
        model(torch.rand(8, 3, 32, 32))
    return model


def logits_and_gradient(twin: FrozenTwin, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    logits = twin(x)
    return logits, torch.autograd.grad(logits.log_softmax(1)[:, 0].sum(), x)[0]


@pytest.mark.parametrize(
    "options", [{"fuse_relu": True}, {"pad_stem": True}, {"fuse_relu": True, "pad_stem": True}], ids=str
)
@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "wrn-34-10"])
def test_every_network_computes_the_same(arch, options):
    model = trained(arch).double()
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plain = FrozenTwin(model, channels_last=True)
    twin = FrozenTwin(model, channels_last=True, **options)
    for ours, theirs in zip(logits_and_gradient(twin, x), logits_and_gradient(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    with torch.no_grad():  # both follow the live weights
        for parameter in model.parameters():
            parameter.mul_(1.1)
    plain.refresh()
    before = {name: t.data_ptr() for name, t in twin.state_dict().items()}
    twin.refresh()
    assert {name: t.data_ptr() for name, t in twin.state_dict().items()} == before
    for ours, theirs in zip(logits_and_gradient(twin, x), logits_and_gradient(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("arch", "number"), [("resnet18", 17), ("smallresnet", 7), ("preactresnet18", 8)])
def test_what_is_fused(arch, number):
    """Every convolution of a ResNet but those of the shortcuts; of a pre-activation one, each block's first."""
    twin = FrozenTwin(build_model(arch, 10), fuse_relu=True)
    assert sum(isinstance(module, FusedConvReLU) for module in twin.modules()) == number
    assert not any(isinstance(module, nn.Identity) for module in twin.net.modules())


@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "wrn-34-10"])
def test_a_silu_is_not_fused(arch):
    """The fused operator computes a ReLU. Batch norm is folded as before."""
    model = trained(arch, "silu").double()
    twin = FrozenTwin(model, fuse_relu=True, pad_stem=True, channels_last=True)
    assert not any(isinstance(module, FusedConvReLU) for module in twin.modules())
    assert len(twin.folded) == len(FrozenTwin(trained(arch)).folded)
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for ours, theirs in zip(logits_and_gradient(twin, x), logits_and_gradient(model.eval(), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_convolution_that_others_read_is_not_fused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            out = self.conv(x)
            return (F.relu(out) - out).mean((2, 3))

    twin = FrozenTwin(Net(), fold_bn=False, fuse_relu=True)
    assert not any(isinstance(module, FusedConvReLU) for module in twin.modules())


def test_a_copied_twin_keeps_its_options():
    twin = copy.deepcopy(FrozenTwin(trained("smallresnet"), fuse_relu=True, pad_stem=True, channels_last=True))
    assert any(isinstance(module, FusedConvReLU) for module in twin.modules())
    assert any(module.in_channels == 8 for module in twin.modules() if isinstance(module, nn.Conv2d)) or any(
        module.weight.shape[1] == 8 for module in twin.modules() if isinstance(module, FusedConvReLU)
    )


def test_compiled_with_func_grad():
    """As the attack step of a compiled backend uses it."""
    model = trained("smallresnet")
    twin = FrozenTwin(model, fuse_relu=True, pad_stem=True, channels_last=True)
    x = torch.rand(4, 3, 16, 16)

    def gradient(x):
        return torch.func.grad(lambda point: twin(point).log_softmax(1)[:, 0].sum())(x)

    _, expected = logits_and_gradient(FrozenTwin(model, channels_last=True), x)
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True)(x), expected, rtol=1e-3, atol=1e-5)


def test_support_is_tried():
    cpu = torch.device("cpu")
    assert is_supported(cpu, torch.float32)
    assert is_supported(cpu, torch.float64), "by the separate operators"
