"""The frozen twin: a copy of ``model.eval()`` that makes attack steps cheap.

An attack needs the gradient of the loss with respect to the image only. The live network is expensive for that: a
compiled backward pass also computes every weight gradient (forward and backward then cost 3 units of work, not 2),
batch norm is a separate pass over memory, and switching between train() and eval() invalidates compiled code. The twin
is a second module tree for the same weights. It is always in eval mode, has no parameter gradients, has its batch norm
folded into the convolutions, and uses the dtype and memory format of the attack.

Folding: bn(conv(x; W, b)) = conv(x; s W, t + s b) with s = gamma / sqrt(var + eps) and t = beta - s mean, one value per
output channel. A batch norm that does not follow a convolution (pre-activation networks) becomes x s + t.
"""

import copy
import warnings
from collections import Counter
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast.models import fused_conv
from ltat_fast.models.classifier import FullPrecisionLinear, has_hooks
from ltat_fast.models.joint_batch import JointBatchNorm2d, JointSyncBatchNorm
from ltat_fast.models.sync_batch_norm import CpuSyncBatchNorm

STEM_CHANNELS = 8


class ChannelAffine(nn.Module):
    """Compute x * scale + shift for x (N, C, H, W), with one scale and one shift per channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, like: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("scale", torch.empty_like(like, dtype=dtype).view(-1, 1, 1))
        self.register_buffer("shift", torch.empty_like(like, dtype=dtype).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not x.is_contiguous(memory_format=torch.channels_last):
            return x * self.scale + self.shift  # 2.5 times faster than addcmul, which is not vectorised for this case
        return torch.addcmul(self.shift, x, self.scale)


class PadChannels(nn.Module):
    """Append ``number`` channels of zeros to images (N, C, H, W)."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 0, self.number))


class FrozenTwin(nn.Module):
    """``model`` in eval mode: images (N, C, H, W) to logits (N, num_classes), differentiable in the images only.

    Args:
        fold_bn: fold each batch norm into the convolution before it, if :mod:`torch.fx` can show that nothing else
            reads the output of the convolution
        dtype: dtype of the computation, for example ``torch.bfloat16``; None keeps that of ``model``. Images are cast
            inside, so their gradient has their dtype; logits are cast to float32. Call the twin outside autocast.
        channels_last: use the channels_last memory format for images and weights
        fuse_relu: compute convolution, addition and ReLU in one library call (:mod:`ltat_fast.models.fused_conv`)
        pad_stem: for a convolution with fewer than 8 input channels, append channels of zeros to its images until they
            have 8 channels, the number that tensor cores need; the results are the same

    If nothing needs a conversion (``fold_bn=False``, the dtype and memory format of ``model``), the twin shares the
    storage of all tensors with ``model``, is always up to date, and :meth:`refresh` does nothing. Otherwise it computes
    with the weights and statistics of the last :meth:`refresh`, which must follow every optimizer step.

    The twin never writes to ``model``. ``model`` must keep its tensors: move it to its device before building the twin.

    Attributes:
        live: ``model``
        folded: names of the folded layers, as pairs (convolution, batch norm)
    """

    live: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_bn: bool = True,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        fuse_relu: bool = False,
        pad_stem: bool = False,
    ):
        super().__init__()
        self.dtype, self.fold_bn, self.fuse_relu, self.pad_stem = dtype, fold_bn, fuse_relu, pad_stem
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        object.__setattr__(self, "live", model)  # nn.Module's own __setattr__ would register it as a submodule

        live = dict(named_tensors(model))
        full_precision = [module for module in model.modules() if isinstance(module, FullPrecisionLinear)]
        self._keep_dtype = {id(t) for module in full_precision for _, t in named_tensors(module)}
        shares = (
            not fold_bn and not pad_stem and all(self._convert(t).data_ptr() == t.data_ptr() for t in live.values())
        )
        # deepcopy() does not copy an object that its memo already maps to another. With the converted tensors in the
        # memo it copies only the module tree.
        memo = {id(t): self._convert(t, copy=not shares) for t in live.values()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(memo[id(p)], requires_grad=False)
        self.net = copy.deepcopy(model, memo).eval()

        # The tensors that refresh() reads and writes. Scales and shifts have the dtype of the live model.
        # (live batch norm, its scale, its shift)
        self._norms: list[tuple[_PlainNorm, Tensor, Tensor]] = []
        # (live bias of a folded convolution, scale, shift)
        self._biased: list[tuple[Tensor, Tensor, Tensor]] = []
        # (live weight of a folded convolution, scale in a shape that broadcasts to it, folded weight)
        self._scaled: list[tuple[Tensor, Tensor, Tensor]] = []
        # (source, destination)
        self._copied: list[tuple[Tensor, Tensor]] = []
        self.folded = tuple(foldable_pairs(self.net)) if fold_bn else ()
        if fold_bn:
            self._fold()
        if not shares:
            written = {id(folded) for _, _, folded in self._scaled} | {id(t) for _, t in self._copied}
            rest = {id(t): (live[name], t) for name, t in named_tensors(self.net) if name in live}
            self._copied += [pair for key, pair in rest.items() if key not in written]
        if pad_stem:
            self._pad_stem()
        if fuse_relu and (graph := trace(self.net)) is not None:
            self.net = fused_conv.fuse_relu(self.net, graph)
        self.refresh()

    def _convert(self, t: Tensor, copy: bool = False) -> Tensor:
        """Return ``t`` in the dtype and memory format of the twin.

        The result shares the storage of ``t`` if nothing has to be converted and ``copy`` is not set.
        """
        convert = self.dtype is not None and t.is_floating_point() and id(t) not in self._keep_dtype
        dtype = self.dtype if convert else t.dtype
        layout = self.memory_format if t.dim() == 4 else torch.preserve_format
        return t.detach().to(dtype=dtype, memory_format=layout, copy=copy)

    @torch.no_grad()
    def _fold(self) -> None:
        """Replace each batch norm by an identity if it is folded, otherwise by a :class:`ChannelAffine`."""
        conv_before = {bn: conv for conv, bn in self.folded}
        for bn_name in [name for name, module in self.net.named_modules() if is_plain_norm(module)]:
            live_bn = cast(_PlainNorm, self.live.get_submodule(bn_name))
            scale, shift = torch.empty_like(live_bn.running_var), torch.empty_like(live_bn.running_var)
            self._norms.append((live_bn, scale, shift))
            if bn_name in conv_before:
                conv = cast(nn.Conv2d, self.net.get_submodule(conv_before[bn_name]))
                live_conv = cast(nn.Conv2d, self.live.get_submodule(conv_before[bn_name]))
                conv.bias = nn.Parameter(torch.empty_like(scale, dtype=conv.weight.dtype), requires_grad=False)
                self._scaled.append((live_conv.weight, scale.view(-1, 1, 1, 1), conv.weight))
                self._copied.append((shift, conv.bias))
                if live_conv.bias is not None:
                    self._biased.append((live_conv.bias, scale, shift))
                replacement = nn.Identity()
            else:
                replacement = ChannelAffine(scale, self.dtype or scale.dtype)
                self._copied += [(scale.view(-1, 1, 1), replacement.scale), (shift.view(-1, 1, 1), replacement.shift)]
            self.net.set_submodule(bn_name, replacement)

    def _pad_stem(self) -> None:
        """Pad the images and weights of each convolution with fewer than 8 input channels with zeros to 8 channels."""
        for name, conv in list(self.net.named_modules()):
            if type(conv) is not nn.Conv2d or conv.in_channels >= STEM_CHANNELS or conv.groups != 1:
                continue
            own = conv.weight
            weight = own.new_zeros(len(own), STEM_CHANNELS, *own.shape[2:])
            weight = weight.to(memory_format=self.memory_format)
            used = weight[:, : conv.in_channels]
            used.copy_(own)
            self._scaled = [(w, s, used if folded is own else folded) for w, s, folded in self._scaled]
            self._copied = [(source, used if target is own else target) for source, target in self._copied]
            padding = PadChannels(STEM_CHANNELS - conv.in_channels)
            conv.weight, conv.in_channels = nn.Parameter(weight, requires_grad=False), STEM_CHANNELS
            self.net.set_submodule(name, nn.Sequential(padding, conv))

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the twin from the live weights and statistics.

        Safe inside a CUDA graph: no lasting allocation, no synchronisation, and every tensor keeps its address.
        """
        if self._norms:
            norms, scale, shift = zip(*self._norms, strict=True)
            torch._foreach_copy_(scale, [bn.running_var for bn in norms])
            torch._foreach_add_(scale, [bn.eps for bn in norms])
            torch._foreach_rsqrt_(scale)
            torch._foreach_mul_(scale, [bn.weight for bn in norms])
            torch._foreach_copy_(shift, [bn.bias for bn in norms])
            torch._foreach_addcmul_(shift, [bn.running_mean for bn in norms], scale, value=-1)
        if self._biased:
            bias, scale, shift = zip(*self._biased, strict=True)
            torch._foreach_addcmul_(shift, bias, scale)
        for weight, scale, folded in self._scaled:
            # foreach has no fused path for a broadcast. mul(out=) is 5 times slower on CPU if the dtypes differ.
            folded.copy_(weight * scale)
        if self._copied:
            source, destination = zip(*self._copied, strict=True)
            torch._foreach_copy_(destination, source)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x.to(dtype=self.dtype or x.dtype, memory_format=self.memory_format))
        return logits if self.dtype is None else logits.float()

    def train(self, mode: bool = True) -> "FrozenTwin":
        """Stay in eval mode; ``mode`` is ignored."""
        return super().train(False)

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a FrozenTwin cannot be moved or cast: move or cast its live model, then build a new twin")

    def __deepcopy__(self, memo):
        """Return a twin of a copy of the live model. Copying an object that holds both copies the model only once."""
        channels_last = self.memory_format is torch.channels_last
        live = copy.deepcopy(self.live, memo)
        options = {"fold_bn": self.fold_bn, "fuse_relu": self.fuse_relu, "pad_stem": self.pad_stem}
        return FrozenTwin(live, dtype=self.dtype, channels_last=channels_last, **options)

    def __reduce_ex__(self, protocol):
        raise TypeError("a FrozenTwin cannot be pickled: save the weights of its live model instead")


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers; a shared tensor appears under each of its names."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, CpuSyncBatchNorm, JointBatchNorm2d, JointSyncBatchNorm)


class _Tracer(torch.fx.Tracer):
    """A tracer that also treats our own layers and subclasses of torch's layers as single nodes."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*NORMS, nn.Linear, ChannelAffine)) or super().is_leaf_module(module, name)


def trace(net: nn.Module) -> torch.fx.Graph | None:
    """Return the torch.fx graph of ``net``, or None, with a warning, if it cannot be traced."""
    try:
        return _Tracer().trace(net)
    except Exception as error:  # tracing runs the network's own code, which can raise any exception
        warnings.warn(f"nothing is folded or fused: {type(net).__name__} cannot be traced ({error})", stacklevel=4)
        return None


class _PlainNorm(Protocol):
    """The type of the batch norms that :func:`is_plain_norm` accepts: none of its tensors is None."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float


def is_plain_norm(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm over (N, C, H, W) that is a fixed affine map in eval mode and has no hooks."""
    return bool(type(module) in NORMS and module.affine and module.running_var is not None and not has_hooks(module))


def foldable_pairs(net: nn.Module) -> list[tuple[str, str]]:
    """Return the names (convolution, batch norm) of all pairs that can be folded.

    The convolution is a plain ``nn.Conv2d`` and only the batch norm reads its output. Both are called once, and no
    other module shares their weights. A network that :mod:`torch.fx` cannot trace (data-dependent control flow) gives
    a warning and no pairs.
    """
    if (graph := trace(net)) is None:
        return []
    modules = dict(net.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read_directly = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners = Counter(id(t) for _, t in named_tensors(net))

    def is_private(node: torch.fx.Node) -> bool:
        weight = modules[str(node.target)].weight
        return calls[node.target] == 1 and owners[id(weight)] == 1 and node.target not in read_directly

    pairs = []
    for bn in graph.nodes:
        if bn.op != "call_module" or not is_plain_norm(modules[bn.target]):
            continue
        conv = bn.all_input_nodes[0]
        if (
            conv.op == "call_module"
            and type(modules[conv.target]) is nn.Conv2d
            and not has_hooks(modules[conv.target])
            and len(conv.users) == 1
            and is_private(conv)
            and is_private(bn)
        ):
            pairs.append((conv.target, bn.target))
    return pairs
