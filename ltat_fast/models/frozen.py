"""The frozen twin: the live network in eval mode, with parameters that ask for no gradient."""

import copy

from torch import Tensor, nn


class FrozenTwin(nn.Module):
    """Computes what ``model.eval()`` computes, without touching ``model``; parameters share its storage."""

    def __init__(self, model, *, fold_bn=False, dtype=None, channels_last=False):
        super().__init__()
        if fold_bn or dtype is not None or channels_last:
            raise NotImplementedError("folding, casting and channels_last are on their way")
        memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
        memo |= {id(b): b for b in model.buffers()}
        self.net = copy.deepcopy(model, memo).eval()

    def train(self, mode: bool = True) -> "FrozenTwin":
        return super().train(False)

    def refresh(self) -> None:
        """Re-read the live weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
