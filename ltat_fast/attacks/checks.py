"""Checks against false confidence: may the robust accuracy of this model, as gradient attacks find it, be believed?

An attack that fails says that an image is robust or that the attack is weak. Each check looks for one known cause of
weakness (Carlini et al. 2019, arXiv 1902.06705; Athalye et al. 2018; Zimmermann et al. 2022) on a few dozen images.
They are for any ``nn.Module`` from images ``(B, C, H, W)``, float32 in [0, 1], to logits ``(B, K)``; apart from
:func:`check_invariance`, which takes the model as it is, they look at it in eval mode. None changes the model.

All seven cost about 130 gradients an image: on 64 images what AutoAttack costs on four.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast import seeding
from ltat_fast.attacks.objectives import Objective, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, pgd
from ltat_fast.models.frozen import FrozenTwin

STEPS = (1, 10, 50)


@dataclass(frozen=True)
class Check:
    """What a check found. value: the quantity it judges, of which ``detail`` says what it is and what is wanted."""

    name: str
    passed: bool
    value: float
    detail: str


def run_checks(model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, seed: int = 0) -> list[Check]:
    """All checks, in the order in which they should be read.

    x: float32 images ``(N, C, H, W)``, 64 to 128 of them, of all classes. labels: int64 ``(N,)``. eps: radius of the
    L_inf ball that the evaluation uses. seed: of the noise and the planted examples.
    """
    twin = _frozen(model)
    return [
        check_range(x),
        check_invariance(model, x),
        check_logits(twin, x),
        check_gradients(twin, x, labels),
        check_steps(twin, x, labels, eps, seed=seed),
        check_unbounded(twin, x, labels, seed=seed),
        check_planted(twin, x, eps, seed=seed),
    ]


def check_range(x: Tensor) -> Check:
    """Images lie in [0, 1], where attacks clamp to and eps is measured; normalisation belongs inside the model.

    value: how far the worst pixel is outside.
    """
    low, high = x.min().item(), x.max().item()
    outside = max(0.0, -low, high - 1)
    return Check("range", outside == 0, outside, f"pixels from {low:g} to {high:g}; wanted: from 0 to 1")


@torch.no_grad()
def check_invariance(model: nn.Module, x: Tensor, *, tolerance: float = 1e-3) -> Check:
    """The logits of an image are a function of that image alone.

    No module is in train mode, and the logits are the same when asked again, in another order and in smaller batches.
    Batch statistics and random layers break that; for a model that is random on purpose use autoattack-rand.
    value: the largest difference, as a share of the largest logit.
    """
    training = 0 if isinstance(model, FrozenTwin) else sum(module.training for module in model.modules())
    before = [buffer.clone() for buffer in model.buffers()]
    logits = model(x)
    others = [model(x), model(x.flip(0)).flip(0), torch.cat([model(part) for part in x.split(len(x) // 3 + 1)])]
    for buffer, value in zip(model.buffers(), before, strict=True):
        buffer.copy_(value)
    scale = logits.abs().amax().clamp_min(torch.finfo(logits.dtype).tiny)
    difference = max((other - logits).abs().amax() / scale for other in others).item()
    detail = (
        f"the same image in another batch, order or call moves the logits by {difference:.2g} of the largest; "
        f"wanted: at most {tolerance:g}; {training} modules are in train mode; wanted: none"
    )
    return Check("invariance", training == 0 and difference <= tolerance, difference, detail)


@torch.no_grad()
def check_logits(model: nn.Module, x: Tensor, *, tolerance: float = 1e-4) -> Check:
    """The outputs are logits, not probabilities or their logarithms.

    A softmax inside the model takes the gradient away where it is confident, and makes margins and DLR meaningless.
    value: how far the outputs of any image are from summing to 1, or their exponentials from it; the nearer of both.
    """
    z = _frozen(model)(x)
    as_probabilities = (z.sum(1) - 1).abs().amax().item() if z.amin() >= 0 else torch.inf
    distance = min(as_probabilities, z.logsumexp(1).abs().amax().item())
    detail = f"outputs miss being (log-)probabilities by {distance:.2g}; wanted: more than {tolerance:g}"
    return Check("logits", distance > tolerance, distance, detail)


def check_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Check:
    """Cross-entropy has a gradient at every image: neither all zero nor infinite or NaN.

    Without one sign attacks stand still. Saturated softmax is one cause, and then scaled-pgd and autoattack (its DLR
    loss) still work; rounding and other steps without derivative are another.
    value: percent of images without.
    """
    point = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(_frozen(model)(point), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point)
    largest = gradient.flatten(1).abs().amax(1)
    dead = _percent(~((largest > 0) & largest.isfinite()))
    return Check("gradients", dead == 0, dead, f"{dead:.1f} % of images have no input gradient; wanted: none")


def check_steps(
    model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, tolerance: float = 3.0, seed: int = 0
) -> Check:
    """More steps never help the defender: PGD with 1, 10 and 50 steps from the same start.

    value: the largest rise of accuracy from fewer to more steps, in points. tolerance: PGD circles where it cannot
    climb, and an image on the decision boundary may fall on either side of it.
    """
    twin = _frozen(model)
    accuracies = [
        _percent(_attacked(twin, x, scaled_cross_entropy(labels), AttackConfig(eps, eps / 4, k), seed) == labels)
        for k in STEPS
    ]
    rise = max(later - earlier for i, earlier in enumerate(accuracies) for later in accuracies[i + 1 :])
    found = ", ".join(f"{accuracy:.1f} %" for accuracy in accuracies)
    steps = ", ".join(map(str, STEPS))
    detail = f"accuracy after {steps} steps: {found}; wanted: no rise above {tolerance:g} points"
    return Check("steps", rise <= tolerance, rise, detail)


def check_unbounded(model: nn.Module, x: Tensor, labels: Tensor, *, seed: int = 0) -> Check:
    """With eps = 1 nothing is left: the attack may put any image in the place of any other.

    Even one that looks at no gradient can blank all images alike, which leaves at most the share of the most frequent
    class; so accuracy may not be above that. Otherwise gradients lead away from adversarial examples.
    value: accuracy in percent.
    """
    predictions = _attacked(_frozen(model), x, scaled_cross_entropy(labels), AttackConfig(1.0, 0.1, 50), seed)
    accuracy, chance = _percent(predictions == labels), 100 * labels.bincount().amax().item() / len(labels)
    detail = f"accuracy at eps 1: {accuracy:.1f} %; wanted: at most {chance:.1f} %, the share of one class"
    return Check("unbounded", accuracy <= chance, accuracy, detail)


@torch.no_grad()
def check_planted(model: nn.Module, x: Tensor, eps: float, *, corners: int = 16, seed: int = 0) -> Check:
    """The active test: an adversarial example that is known to exist is found.

    After Zimmermann et al. (2022): a new decision is read off the model's outputs z so that an adversarial example in
    the eps-ball of every image x is certain. Of ``corners`` random corners of the ball, the corner c whose outputs are
    furthest from those of x is planted: u = (z(c) - z(x)) / |z(c) - z(x)|, and x' counts as adversarial where
    u . (z(x') - z(x)) reaches 0.9 |z(c) - z(x)|. PGD-20 on that score must find such an x' for 95 % of the images. No
    gradient was used to plant, so masked or misleading gradients do not excuse the attack; random noise, whose own
    share of successes is in the detail, seldom does as well as the best corner. Zimmermann et al. train the readout on
    the penultimate layer; the outputs serve any module.
    value: percent found.
    """
    twin = _frozen(model)
    generator = seeding.stream(x.device, seed, "planted")
    clean = twin(x)
    best, distance = clean, clean.new_zeros(len(x))
    for _ in range(corners):
        signs = torch.empty_like(x).bernoulli_(generator=generator).mul_(2).sub_(1)
        z = twin((x + eps * signs).clamp(0, 1))
        further = (z - clean).norm(dim=1) > distance
        best = torch.where(further[:, None], z, best)
        distance = (best - clean).norm(dim=1)
    towards = F.normalize(best - clean, dim=1)

    def score(logits: Tensor) -> Tensor:
        return ((logits - clean) * towards).sum(1)

    def found(x_adv: Tensor) -> float:
        return _percent((score(twin(x_adv)) >= 0.9 * distance) & (distance > 0))

    noise = torch.empty_like(x).uniform_(-eps, eps, generator=generator)
    by_chance = found((x + noise).clamp(0, 1))
    share = found(pgd(twin, x, lambda x_adv, logits: score(logits).sum(), AttackConfig(eps, eps / 4, 20), generator))
    detail = f"planted adversarial examples found: {share:.1f} %; wanted: at least 95 %; by noise: {by_chance:.1f} %"
    return Check("planted", share >= 95, share, detail)


def _frozen(model: nn.Module) -> FrozenTwin:
    return model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)


@torch.no_grad()
def _attacked(twin: FrozenTwin, x: Tensor, objective: Objective, config: AttackConfig, seed: int) -> Tensor:
    """Predictions ``(N,)`` after PGD from a start that is a function of the seed."""
    return twin(pgd(twin, x, objective, config, seeding.stream(x.device, seed, "checks"))).argmax(1)


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()
