"""Noise and occlusion on the pixels that a network relies on most, random noise, and the noises of ImageNet-C.

Chen, Dong, Xie, "Releasing Inequality Phenomenon in L_inf-norm Adversarial Training via Input Gradient Distillation"
(IGD, 2023), after Duan et al. (ICLR 2023); Hendrycks, Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019). INA is the inductive noise attack, RN is random noise. Let
k = floor(t * C*H*W) be a number of single channel values, M the mask of the k values with the largest *signed*
attribution (for RN: of k random values), and n ~ N(0, 1) for each value:

    INA1, RN  clip(x + M n),      INA2  clip((1 - M) x + M n)

    occlusion  one colour on the squares [i - r, i + r) x [j - r, j + r) around the pixels with the largest attribution
               (mean over channels): first 1 pixel with r = 1, 2, ... R, then 2 pixels, ... up to 10; an image counts
               as an error if any of these occlusions changes its class

The papers state these formulas. Duan et al. draw n uniformly between the extremes of the image and loop over r first;
we follow IGD. The R = 20 of IGD is for images of 224 pixels and is scaled with the image. Its t of 0.2 to 2 percent
select nothing in an image of 64 values, so images of fewer than 500 values use the t of RN for INA, 2 to 20 percent
(:func:`inductive_shares`).
"""

import torch
from torch import Tensor, nn

from ltat_fast.analysis.gradients import frozen

RANDOM_SHARES = tuple(round(0.02 * i, 2) for i in range(1, 11))
COLOURS = {"grey": 0.5, "white": 1.0, "black": 0.0}  # grey and white from IGD, black from Duan et al.
# Severities 1 to 5: standard deviation of gaussian noise, photons of shot noise, share of impulse noise.
CONSTANTS = {
    "CIFAR-10-C": {
        "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot": (500, 250, 100, 75, 50),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
    },
    "Tiny-ImageNet-C": {
        "gaussian": (0.04, 0.08, 0.12, 0.15, 0.18),
        "shot": (250, 100, 50, 30, 15),
        "impulse": (0.01, 0.02, 0.05, 0.08, 0.14),
    },
    "ImageNet-C": {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
    },
}


def constants_for(size: int) -> str:
    """The name of the set of :data:`CONSTANTS` for images of ``size`` pixels width."""
    return "CIFAR-10-C" if size <= 32 else "Tiny-ImageNet-C" if size <= 64 else "ImageNet-C"


def inductive_shares(entries: int) -> tuple[float, ...]:
    """The t of INA1 and INA2 for images of ``entries`` values: the published ones, or those of RN below 500."""
    return tuple(round(t / 10, 3) for t in RANDOM_SHARES) if entries >= 500 else RANDOM_SHARES


def top_mask(scores: Tensor, share: float) -> Tensor:
    """Mask of the floor(share * C*H*W) highest ``scores`` ``(B, C, H, W)`` of each image: bool, like ``scores``."""
    flat = scores.flatten(1)
    count = int(share * flat.shape[1] + 1e-9)  # 0.29 * 100 is 28.999999999999996
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count, dim=1).indices, True)
    return mask.view(scores.shape)


def random_mask(like: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Mask of as many entries as in :func:`top_mask`, drawn uniformly without replacement."""
    return top_mask(torch.rand(like.shape, generator=generator, device=like.device), share)


def add_noise(x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Add ``noise`` to the masked entries of ``x`` and clip to [0, 1]: INA1, and RN with a random mask."""
    return torch.where(mask, x + noise, x).clamp(0, 1)


def replace_by_noise(x: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """Replace the masked entries of ``x`` by ``noise`` and clip to [0, 1]: INA2."""
    return torch.where(mask, noise, x).clamp(0, 1)


def occlusion_radius(size: int) -> int:
    """R for images of ``size`` pixels width, in proportion to IGD, which has 20 for 224 pixels."""
    return max(1, round(20 * size / 224))


def occlusion_mask(attribution: Tensor, pixels: int, radius: int) -> Tensor:
    """Mask of the squares around the ``pixels`` pixels of each image with the largest attribution: ``(B, 1, H, W)``."""
    height, width = attribution.shape[2:]
    best = attribution.mean(1).flatten(1).topk(pixels, dim=1).indices[:, :, None]
    rows = torch.arange(height, device=best.device) - best // width
    columns = torch.arange(width, device=best.device) - best % width
    rows, columns = ((-radius <= d) & (d < radius) for d in (rows, columns))
    return (rows[:, :, :, None] & columns[:, :, None, :]).any(1, keepdim=True)


@torch.no_grad()
def correct_under_occlusion(
    model: nn.Module, x: Tensor, y: Tensor, attribution: Tensor, colour: float, pixels: int = 10, radius: int = 0
) -> Tensor:
    """Whether the image is classified correctly under every occlusion of the search: bool ``(B,)``.

    radius: R; 0 for :func:`occlusion_radius`.
    """
    model = frozen(model)
    radius = radius or occlusion_radius(min(x.shape[2:]))
    alive = model(x).argmax(1) == y
    for count in range(1, pixels + 1):
        for r in range(1, radius + 1):
            left = alive.nonzero().squeeze(1)
            if len(left) == 0:
                return alive
            covered = torch.where(occlusion_mask(attribution[left], count, r), colour, x[left])
            alive[left] = model(covered).argmax(1) == y[left]
    return alive


def gaussian_noise(x: Tensor, std: float, generator: torch.Generator) -> Tensor:
    """x + N(0, std^2), clipped to [0, 1]."""
    return (x + std * torch.randn(x.shape, generator=generator, device=x.device)).clamp(0, 1)


def shot_noise(x: Tensor, photons: float, generator: torch.Generator) -> Tensor:
    """Poisson(photons * x) / photons, clipped to [0, 1]."""
    return (torch.poisson(x * photons, generator=generator) / photons).clamp(0, 1)


def impulse_noise(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Set each entry with probability ``share`` to 0 or 1, both equally likely."""
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(draw < share, (draw < share / 2).to(x.dtype), x)


COMMON = {"gaussian": gaussian_noise, "shot": shot_noise, "impulse": impulse_noise}
