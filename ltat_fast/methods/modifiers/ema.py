"""EMA: an exponential moving average of the weights theta, which is evaluated and saved in their place.

    theta_ema <- d theta_ema + (1 - d) theta   after every update
    d = 0 in the first 2.5 % of the steps, then min(decay, (1 + t) / (10 + t)),   t = steps since then

Source: the public code of DeepMind's adversarial training (adversarial_robustness, jax/experiment.py) and its port
imrahulr/adversarial_robustness_pytorch (watrain.py), where the decay is 0.995.

As in that code, the statistics of batch norm are not averaged. They are copied from the live network at the end of an
epoch, before anything uses the average.
"""

import copy
import math

import torch
from torch import Tensor, nn

WARM_UP = 40  # the average is a copy in the first 1 / 40 of the steps


class WeightAverage:
    """The average of the weights of a network.

    model: the network with averaged weights, in eval mode and without gradients; at first a copy of the network that is
    averaged. decay: highest value of d. weight: scalar on the device of the network, the 1 - d of the current step,
    which the host fills.
    """

    def __init__(self, model: nn.Module, decay: float):
        # With the copied tensors in its memo, deepcopy() copies only the module tree: it cannot copy fake tensors.
        memo = {id(buffer): buffer.clone() for buffer in model.buffers()}
        memo |= {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in model.parameters()}
        self.model = copy.deepcopy(model, memo).eval()
        self.decay = decay
        like = next(model.parameters())
        self.weight = torch.tensor(1 - decay, dtype=like.dtype, device=like.device)

    def decay_at(self, step: int, steps: int) -> float:
        """Return the d of ``step``, from 0, of a stage of ``steps`` steps."""
        since = step - math.ceil(steps / WARM_UP)
        return 0.0 if since < 0 else min(self.decay, (1 + since) / (10 + since))

    def update(self, live: nn.Module) -> None:
        """Move the average towards the weights of ``live``. The result is a bit-equal copy if d is 0."""
        average: list[Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(average, [p.detach() for p in live.parameters()], [self.weight] * len(average))

    @torch.no_grad()
    def copy_buffers(self, live: nn.Module) -> None:
        """Copy the statistics of batch norm from ``live``."""
        for own, buffer in zip(self.model.buffers(), live.buffers(), strict=True):
            own.copy_(buffer)
