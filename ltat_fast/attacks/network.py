"""A network under attack: a fast copy that attacks search on, and the network itself, in float32, which decides."""

from typing import Literal

import torch
from torch import Tensor, nn

from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.fused_conv import is_supported
from ltat_fast.models.precision import has_bf16, without_tf32

Precision = Literal["auto", "fp32", "bf16"]


class Network:
    """Images ``(N, C, H, W)``, float32 in [0, 1], to logits ``(N, K)``.

    model: in any mode; it is attacked in eval mode. Of a frozen twin, its live network.
    precision: of the search: "bf16", "fp32", or "auto", which is bf16 if the hardware has it.

    Attributes:
        search: the frozen twin for the search
        precise: the frozen twin for a search in float32; ``search`` itself if that is in float32
        tolerance: bound on the rounding error of a margin of ``search``, as a share of the range of the logits
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: Precision = "auto"):
        live = model.live if isinstance(model, FrozenTwin) else model
        fast = precision == "bf16" or (precision == "auto" and has_bf16(device))
        self._live = FrozenTwin(live, fold_bn=False)
        self.precise = FrozenTwin(live)
        self.search = _fast_twin(live, device) if fast else self.precise
        self.tolerance = 0.05 if fast else 1e-4

    @property
    def is_exact(self) -> bool:
        """Whether the search is in float32."""
        return self.search is self.precise

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the network itself, in strict float32 (no TF32, no folded batch norm)."""
        with without_tf32():
            return self._live(x)


def _fast_twin(live: nn.Module, device: torch.device) -> FrozenTwin:
    on_gpu = device.type == "cuda"
    fuse = on_gpu and is_supported(device, torch.bfloat16)
    return FrozenTwin(live, dtype=torch.bfloat16, channels_last=True, fuse_relu=fuse, pad_stem=on_gpu)
