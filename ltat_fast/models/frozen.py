"""The frozen twin: what ``model.eval()`` computes, at the price of an attack step.

An attack differentiates the loss with respect to the image only. Run on the live network it pays for more: a compiled
backward also computes every weight gradient (3 units of work where 2 are needed), batch norm is a pass of its own,
and switching between train() and eval() invalidates compiled code. The twin is a second module tree over the same
weights, always in eval mode, without parameter gradients, batch norm folded away, in the attack's dtype and layout.

Folding: bn(conv(x; W, b)) = conv(x; s W, t + s b) with s = gamma / sqrt(var + eps) and t = beta - s mean, one value
an output channel. A batch norm that does not follow a convolution (pre-activation networks) becomes x s + t.
"""

import copy
import warnings
from collections import Counter

import torch
from torch import Tensor, nn

from ltat_fast.models.classifier import FullPrecisionLinear
from ltat_fast.models.sync_batch_norm import CpuSyncBatchNorm


class ChannelAffine(nn.Module):
    """x * scale + shift, one value of each a channel, for x (N, C, H, W)."""

    def __init__(self, like: Tensor, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("scale", torch.empty_like(like, dtype=dtype).view(-1, 1, 1))
        self.register_buffer("shift", torch.empty_like(like, dtype=dtype).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and not x.is_contiguous(memory_format=torch.channels_last):
            return x * self.scale + self.shift  # addcmul is not vectorised here: 2.5 times slower than these two
        return torch.addcmul(self.shift, x, self.scale)


class FrozenTwin(nn.Module):
    """``model`` in eval mode as a function of the image alone. Images (N, C, H, W) in, logits (N, num_classes) out.

    fold_bn: fold batch norm into the convolutions, where :mod:`torch.fx` can see that nothing else reads between them.
    dtype: compute in this dtype, e.g. ``torch.bfloat16``; None keeps the live one. The image is cast inside, so its
        gradient comes back in the image's dtype; logits come back in float32. Call it outside autocast.
    channels_last: convert image and weights to the NHWC layout.

    Where nothing needs converting (``fold_bn=False``, the live dtype and layout) the twin shares all live storage, is
    always up to date, and :meth:`refresh` does nothing. Otherwise it computes with the weights and statistics of the
    last :meth:`refresh`; call that after every optimiser step. The live model is only ever read, and must keep its
    tensors: move it to its device first, then build the twin.

    ``folded`` names the (convolution, batch norm) pairs that were folded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        fold_bn: bool = True,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ):
        super().__init__()
        self.dtype, self.fold_bn = dtype, fold_bn
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.__dict__["live"] = model  # past nn.Module's registration: not a submodule

        live = dict(named_tensors(model))
        precise = [module for module in model.modules() if isinstance(module, FullPrecisionLinear)]
        self._full_precision = {id(t) for module in precise for _, t in named_tensors(module)}
        shares = not fold_bn and all(self._convert(t).data_ptr() == t.data_ptr() for t in live.values())
        # Deep-copying with these stand-ins in the memo copies the module tree and no tensor.
        memo = {id(t): self._convert(t, copy=not shares) for t in live.values()}
        for p in model.parameters():
            memo[id(p)] = nn.Parameter(memo[id(p)], requires_grad=False)
        self.net = copy.deepcopy(model, memo).eval()

        # What refresh() reads and writes. Scales and shifts are in the live precision.
        self._norms: list[tuple[nn.Module, Tensor, Tensor]] = []  # live batch norm, its scale, its shift
        self._biased: list[tuple[Tensor, Tensor, Tensor]] = []  # live bias of a folded convolution, scale, shift
        self._scaled: list[
            tuple[Tensor, Tensor, Tensor]
        ] = []  # live weight, scale shaped to multiply it, folded weight
        self._copied: list[tuple[Tensor, Tensor]] = []  # source, destination
        self.folded = tuple(foldable_pairs(self.net)) if fold_bn else ()
        if fold_bn:
            self._fold()
        if not shares:
            written = {id(folded) for _, _, folded in self._scaled} | {id(t) for _, t in self._copied}
            rest = {id(t): (live[name], t) for name, t in named_tensors(self.net) if name in live}
            self._copied += [pair for key, pair in rest.items() if key not in written]
        self.refresh()

    def _convert(self, t: Tensor, copy: bool = False) -> Tensor:
        """``t`` in the twin's dtype and layout; ``t``'s own storage where it has them already, unless ``copy``."""
        convert = self.dtype is not None and t.is_floating_point() and id(t) not in self._full_precision
        dtype = self.dtype if convert else t.dtype
        layout = self.memory_format if t.dim() == 4 else torch.preserve_format
        return t.detach().to(dtype=dtype, memory_format=layout, copy=copy)

    @torch.no_grad()
    def _fold(self) -> None:
        """Replace every batch norm: by nothing behind a convolution, by a :class:`ChannelAffine` elsewhere."""
        conv_before = {bn: conv for conv, bn in self.folded}
        for bn_name in [name for name, module in self.net.named_modules() if is_plain_norm(module)]:
            live_bn = self.live.get_submodule(bn_name)
            scale, shift = torch.empty_like(live_bn.running_var), torch.empty_like(live_bn.running_var)
            self._norms.append((live_bn, scale, shift))
            if bn_name in conv_before:
                conv = self.net.get_submodule(conv_before[bn_name])
                live_conv = self.live.get_submodule(conv_before[bn_name])
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

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the live weights: no allocation that lasts, no synchronisation, every address as before."""
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
            # One by one: foreach has no fused path for a broadcast. Not mul(out=): 5 times slower across dtypes on CPU.
            folded.copy_(weight * scale)
        if self._copied:
            source, destination = zip(*self._copied, strict=True)
            torch._foreach_copy_(destination, source)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x.to(dtype=self.dtype or x.dtype, memory_format=self.memory_format))
        return logits if self.dtype is None else logits.float()

    def train(self, mode: bool = True) -> "FrozenTwin":
        """Stays in eval mode, whatever ``mode`` says."""
        return super().train(False)

    def _apply(self, fn, recurse=True):
        raise RuntimeError("a FrozenTwin follows its live model: move or cast that, then build a new twin")

    def __deepcopy__(self, memo):
        """The twin of the copied model (of a model copied by the same call, if the caller's object holds both)."""
        channels_last = self.memory_format is torch.channels_last
        live = copy.deepcopy(self.live, memo)
        return FrozenTwin(live, fold_bn=self.fold_bn, dtype=self.dtype, channels_last=channels_last)

    def __reduce_ex__(self, protocol):
        raise TypeError("a FrozenTwin is a view of a live model and is not pickled: save that model's weights")


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it goes by."""
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, CpuSyncBatchNorm)


class _Tracer(torch.fx.Tracer):
    """Takes a layer derived from one of torch's as one node, as it does those of torch."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*NORMS, nn.Linear)) or super().is_leaf_module(module, name)


def is_plain_norm(module: nn.Module) -> bool:
    """A batch norm over (N, C, H, W) whose eval mode is a fixed affine map, and that nobody has hooked into."""
    return type(module) in NORMS and module.affine and module.running_var is not None and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def foldable_pairs(net: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) such that the batch norm is all that ever reads the convolution.

    Both are called once, their weights belong to nobody else, and the convolution is a plain ``nn.Conv2d``. A network
    that :mod:`torch.fx` cannot trace (control flow on data) gives a warning and no pairs.
    """
    try:
        graph = _Tracer().trace(net)
    except Exception as error:  # tracing runs the network's own Python, which may raise anything
        warnings.warn(f"batch norm is not folded: {type(net).__name__} cannot be traced ({error})", stacklevel=3)
        return []
    modules = dict(net.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read_directly = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    owners = Counter(id(t) for _, t in named_tensors(net))

    def is_private(node: torch.fx.Node) -> bool:
        weight = modules[node.target].weight
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
