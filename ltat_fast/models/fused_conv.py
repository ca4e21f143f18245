"""Convolution, bias, optional residual and ReLU as one library call, for networks whose weights are frozen.

    y = relu(conv(x; W, b) [+ residual])

cuDNN and oneDNN compute the sum and the ReLU while they write the result of the convolution, which saves one or two
passes over the activations. Only the gradients of x and of the residual exist:

    d residual = dy [y > 0],   dx = conv_transpose(dy [y > 0]; W)

:func:`fuse_relu` finds these patterns in a network with torch.fx.
"""

import functools
import operator
from collections.abc import Sequence
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.models.classifier import has_hooks

ADDITIONS = (operator.add, operator.iadd, torch.add)
RELUS = (F.relu, torch.relu)


def conv_relu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute :func:`conv_relu` from separate operators."""
    out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return F.relu(out if residual is None else out + residual)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    if x.is_cuda and torch.backends.cudnn.is_acceptable(x):
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, stride, padding, dilation, groups)
    if _onednn_takes(x):
        conv = torch.ops.mkldnn._convolution_pointwise
        arguments = (weight, bias, padding, stride, dilation, groups)
        if residual is None:
            return conv(x, *arguments, "relu", [], None)
        return conv.binary(x, residual, *arguments, "add", 1.0, "relu", [], None)
    return conv_relu_ref(x, weight, bias, residual, stride, padding, dilation, groups)


# A compiler sees this operator as one node and does not look inside. Eager calls use _forward directly, because a
# custom operator costs microseconds per call.
_forward_operator = torch.library.custom_op("ltat::conv_relu", _forward, mutates_args=())


@_forward_operator.register_fake
def _(x, weight, bias, residual, stride, padding, dilation, groups):
    return torch.empty_like(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


class _ConvReLU(torch.autograd.Function):
    """The gradient of an operator of torch.library cannot be taken with torch.func.grad; that of this class can."""

    @staticmethod
    def forward(x, weight, bias, residual, stride, padding, dilation, groups):
        forward = _forward_operator if torch.compiler.is_compiling() else _forward
        return forward(x, weight, bias, residual, stride, padding, dilation, groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, residual, *ctx.geometry = inputs
        ctx.has_residual = residual is not None
        ctx.save_for_backward(x, weight, output)

    @staticmethod
    def backward(ctx, grad):
        x, weight, y = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        grad_x, _, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return grad_x, None, None, grad if ctx.has_residual else None, None, None, None, None


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Return relu(conv2d(x, weight, bias) + residual), differentiable in ``x`` and ``residual``.

    x: ``(N, C, H, W)``. weight: ``(K, C / groups, R, S)`` of the dtype of x. bias: ``(K,)`` or None. residual: of the
    shape of the result, or None. Other arguments as for ``torch.nn.functional.conv2d``.
    Raises ValueError if weight or bias require a gradient, because they would not get one.
    """
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("conv_relu has no gradient for weight and bias: it is for frozen networks")
    return _ConvReLU.apply(x, weight, bias, residual, stride, padding, dilation, groups)


@functools.cache
def is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether :func:`conv_relu` works on ``device`` in ``dtype``: tried once on a small example."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 8, 8), (16, 16, 3, 3), (2, 16, 8, 8))
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    x, weight, addend = (t.to(device, dtype).to(memory_format=torch.channels_last) for t in tensors)
    bias = torch.linspace(-1, 1, 16, device=device, dtype=dtype)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    try:
        for residual in (None, addend):
            ours = _forward(x, weight, bias, residual, *geometry)
            theirs = conv_relu_ref(x, weight, bias, residual, *geometry)
            if not torch.allclose(ours.float(), theirs.float(), rtol=0.05, atol=0.5):
                return False
    except RuntimeError:  # cuDNN has no engine for this
        return False
    return True


def _onednn_takes(x: Tensor) -> bool:
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class FusedConvReLU(nn.Module):
    """A convolution that is followed by [an addition and] a ReLU. It shares weight and bias with ``conv``."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        padding = cast(tuple[int, int], conv.padding)  # _is_private_conv() refuses "same" and "valid"
        self.geometry = ([*conv.stride], [*padding], [*conv.dilation], conv.groups)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return conv_relu(x, self.weight, self.bias, residual, *self.geometry)


def fuse_relu(net: nn.Module, graph: torch.fx.Graph) -> nn.Module:
    """Return ``net`` with its convolutions fused with the ReLU, or the addition and the ReLU, that follows them.

    net: a network in eval mode whose weights are frozen. graph: its torch.fx graph. The result shares all parameters
    and buffers with ``net``; it is ``net`` itself if there is nothing to fuse.
    """
    modules = dict(net.named_modules())
    for node in list(graph.nodes):  # a folded batch norm is an identity
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    fused = {}
    for relu in list(graph.nodes):
        if not _is_relu(relu, modules):
            continue
        before = relu.all_input_nodes[0]
        conv, residual = _conv_and_residual(before, modules)
        if conv is None:
            continue
        name = f"fused_{len(fused)}"
        fused[name] = FusedConvReLU(cast(nn.Conv2d, modules[str(conv.target)]))
        with graph.inserting_before(relu):
            arguments = (conv.args[0],) if residual is None else (conv.args[0], residual)
            relu.replace_all_uses_with(graph.call_module(name, arguments))
        graph.erase_node(relu)
        if residual is not None:
            graph.erase_node(before)
        graph.erase_node(conv)
    if not fused:
        return net
    for name, module in fused.items():
        net.add_module(name, module)
    result = torch.fx.GraphModule(net, graph)
    for name in fused:
        delattr(net, name)
    return result.eval()


def _conv_and_residual(
    node: torch.fx.Node, modules: dict[str, nn.Module]
) -> tuple[torch.fx.Node | None, torch.fx.Node | None]:
    """Return the convolution and the residual (or None) whose sum is ``node``; (None, None) if it cannot be fused."""
    if _is_private_conv(node, modules):
        return node, None
    if node.op == "call_function" and node.target in ADDITIONS and len(node.users) == 1 and not node.kwargs:
        left, right = node.args
        for conv, residual in ((left, right), (right, left)):
            if _is_private_conv(conv, modules) and isinstance(residual, torch.fx.Node):
                return conv, residual
    return None, None


def _is_private_conv(node: object, modules: dict[str, nn.Module]) -> TypeGuard[torch.fx.Node]:
    """Whether ``node`` is a plain convolution whose result is read by exactly one node."""
    if not (isinstance(node, torch.fx.Node) and node.op == "call_module" and len(node.users) == 1):
        return False
    module = modules[str(node.target)]
    plain = type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return plain and not has_hooks(module)


def _is_relu(node: torch.fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[str(node.target)]) is nn.ReLU
    return (node.op == "call_function" and node.target in RELUS) or (
        node.op == "call_method" and node.target in ("relu", "relu_")
    )
