"""Networks and images small enough to reason about."""

import copy

import torch
from torch import Tensor, nn


def small_net(num_classes: int = 3, channels: int = 3, seed: int = 0) -> nn.Sequential:
    """Convolution, batch norm with lived-in statistics, ReLU, linear; for 6x6 images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, stride=2, padding=1),
            nn.Softplus(),
            nn.Flatten(),
            nn.Linear(8 * 9, num_classes),
        )
        norm = net[1]
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.3, 1.5)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_(0, 0.2)
    return net


def images(n: int = 12, channels: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    """Float32 images in [0, 1], some pixels exactly 0 or 1 so that clamping has something to do."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, channels, size, size, generator=generator) * 1.4 - 0.2).clamp(0, 1)


def labels(n: int = 12, num_classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(num_classes, (n,), generator=torch.Generator().manual_seed(seed + 100))


def double(net: nn.Module) -> nn.Module:
    """An independent copy in float64."""
    return copy.deepcopy(net).double()


class Linear(nn.Module):
    """logits = W (x - 0.5), images flattened: everything about attacks on it is known in closed form."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return (x - 0.5).flatten(1) @ self.weight.T
