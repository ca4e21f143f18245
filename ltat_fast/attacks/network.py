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
    precision: of the search: "bf16", "fp32", or "auto", which is bf16 if the hardware has it. pixels: H * W.

    Attributes:
        search: the frozen twin for the search
        precise: the frozen twin for a search in float32; ``search`` itself if that is in float32
    """

    def __init__(self, model: nn.Module, device: torch.device, pixels: int, precision: Precision = "auto"):
        live = model.live if isinstance(model, FrozenTwin) else model
        fast = precision == "bf16" or (precision == "auto" and has_bf16(device))
        self._live = FrozenTwin(live, fold_bn=False)
        self.precise = FrozenTwin(live)
        self.search = _fast_twin(live, device, pixels) if fast else self.precise

    @property
    def is_exact(self) -> bool:
        """Whether the search is in float32."""
        return self.search is self.precise

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of the network itself, in strict float32 (no TF32, no folded batch norm)."""
        with without_tf32():
            return self._live(x)


def _fast_twin(live: nn.Module, device: torch.device, pixels: int) -> FrozenTwin:
    on_gpu = device.type == "cuda"
    fuse = on_gpu and is_supported(device, torch.bfloat16)
    channels_last = on_gpu or pixels >= 16 * 16  # on a CPU, 15 % slower for the 8x8 digits, 7 % faster for 32x32
    return FrozenTwin(live, dtype=torch.bfloat16, channels_last=channels_last, fuse_relu=fuse, pad_stem=on_gpu)
