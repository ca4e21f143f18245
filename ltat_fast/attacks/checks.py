"""Checks against false confidence: can the robust accuracy that gradient attacks measure on a model be trusted?

If an attack fails, either the image is robust or the attack is weak. Each check looks for one known cause of a weak
attack, on a few dozen images. Sources: Carlini et al., "On Evaluating Adversarial Robustness", 2019, arXiv 1902.06705;
Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018; Zimmermann et al.,
"Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022.

The checks take any ``nn.Module`` from images ``(N, C, H, W)``, float32 in [0, 1], to logits ``(N, K)``. They evaluate
it in eval mode; only :func:`check_invariance` uses the mode that the model is in. No check changes the model.

All seven together cost about 130 gradients per image. On 64 images that is the cost of AutoAttack on four images.
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
    """The result of one check.

    value: the measured quantity; each check's docstring defines it. detail: the measured and the expected values, in
    words.
    """

    name: str
    passed: bool
    value: float
    detail: str


def run_checks(model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, seed: int = 0) -> list[Check]:
    """Run all checks and return their results, in the order in which they should be read.

    x: float32 images ``(N, C, H, W)``; 64 to 128 images, of all classes. labels: int64 ``(N,)``. eps: radius of the
    L_inf ball of the evaluation. seed: seed of the noise and of the planted examples.
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
    """Check that images lie in [0, 1].

    Attacks clamp to [0, 1] and measure eps on that scale, so normalisation belongs inside the model.
    value: distance of the worst pixel from [0, 1].
    """
    low, high = x.min().item(), x.max().item()
    outside = max(0.0, -low, high - 1)
    return Check("range", outside == 0, outside, f"pixels from {low:g} to {high:g}; expected: from 0 to 1")


@torch.no_grad()
def check_invariance(model: nn.Module, x: Tensor, *, tolerance: float = 1e-3) -> Check:
    """Check that the logits of an image depend only on that image.

    No module may be in train mode, and the logits must be the same in a second call, in another order and in smaller
    batches. Batch statistics and random layers violate this. Use autoattack-rand for a model that is random on purpose.
    value: largest difference, as a share of the largest logit.
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
        f"another call, order or batch changes the logits by {difference:.2g} of the largest logit; "
        f"expected: at most {tolerance:g}; {training} modules are in train mode; expected: none"
    )
    return Check("invariance", training == 0 and difference <= tolerance, difference, detail)


@torch.no_grad()
def check_logits(model: nn.Module, x: Tensor, *, tolerance: float = 1e-4) -> Check:
    """Check that the outputs are logits, not probabilities or log-probabilities.

    A softmax inside the model removes the gradient of confident images and makes margins and the DLR loss meaningless.
    value: the smaller of two distances, each the largest over images: of the outputs' sum from 1 (infinite if an output
    is negative), and of the outputs' log-sum-exp from 0.
    """
    z = _frozen(model)(x)
    as_probabilities = (z.sum(1) - 1).abs().amax().item() if z.amin() >= 0 else torch.inf
    distance = min(as_probabilities, z.logsumexp(1).abs().amax().item())
    detail = f"distance of the outputs from (log-)probabilities: {distance:.2g}; expected: more than {tolerance:g}"
    return Check("logits", distance > tolerance, distance, detail)


def check_gradients(model: nn.Module, x: Tensor, labels: Tensor) -> Check:
    """Check that cross-entropy has a usable gradient at every image: finite, and not zero everywhere.

    Sign attacks do not move without one. One cause is a saturated softmax; then scaled-pgd and autoattack (its DLR
    loss) still work. Another cause is rounding or any other operation without a derivative.
    value: percent of images without a usable gradient.
    """
    point = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(_frozen(model)(point), labels, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, point)
    largest = gradient.flatten(1).abs().amax(1)
    dead = _percent(~((largest > 0) & largest.isfinite()))
    return Check("gradients", dead == 0, dead, f"{dead:.1f} % of images have no usable input gradient; expected: none")


def check_steps(
    model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, tolerance: float = 3.0, seed: int = 0
) -> Check:
    """Check that more attack steps do not raise the accuracy, with PGD of 1, 10 and 50 steps from the same start.

    tolerance: allowed rise in percentage points. PGD oscillates around a maximum, so an image near the decision
        boundary can end on either side of it.
    value: largest rise of the accuracy from fewer to more steps, in percentage points.
    """
    twin = _frozen(model)
    accuracies = [
        _percent(_attacked(twin, x, scaled_cross_entropy(labels), AttackConfig(eps, eps / 4, k), seed) == labels)
        for k in STEPS
    ]
    rise = max(later - earlier for i, earlier in enumerate(accuracies) for later in accuracies[i + 1 :])
    found = ", ".join(f"{accuracy:.1f} %" for accuracy in accuracies)
    steps = ", ".join(map(str, STEPS))
    detail = f"accuracy after {steps} steps: {found}; expected: no rise above {tolerance:g} points"
    return Check("steps", rise <= tolerance, rise, detail)


def check_unbounded(model: nn.Module, x: Tensor, labels: Tensor, *, seed: int = 0) -> Check:
    """Check that an attack with eps = 1 leaves at most the share of the most frequent class.

    With eps = 1 the attack can turn any image into any other. Even without gradients it could make all images equal,
    which leaves at most the share of one class. If more is left, the gradients lead away from adversarial examples.
    value: accuracy in percent.
    """
    predictions = _attacked(_frozen(model), x, scaled_cross_entropy(labels), AttackConfig(1.0, 0.1, 50), seed)
    accuracy, chance = _percent(predictions == labels), 100 * labels.bincount().amax().item() / len(labels)
    detail = f"accuracy at eps 1: {accuracy:.1f} %; expected: at most {chance:.1f} %, the share of the largest class"
    return Check("unbounded", accuracy <= chance, accuracy, detail)


@torch.no_grad()
def check_planted(model: nn.Module, x: Tensor, eps: float, *, corners: int = 16, seed: int = 0) -> Check:
    """Check that PGD-20 finds adversarial examples that are known to exist, the planted ones (Zimmermann et al. 2022).

    A new decision is built from the model's outputs z, so that the eps-ball of every image x surely contains an
    adversarial example. Of ``corners`` random corners of the ball, take the corner c with the outputs furthest from
    those of x. An x' is adversarial if

        u . (z(x') - z(x)) >= 0.9 |z(c) - z(x)|,   u = (z(c) - z(x)) / |z(c) - z(x)|

    PGD-20 ascends the left side and must find such an x' in 95 % of the images. Planting uses no gradient, so masked or
    misleading gradients make the check fail. ``detail`` also has the share that random noise finds, which is usually
    small. Departure: Zimmermann et al. train the decision on the penultimate layer; the outputs work for any module.
    value: percent of images for which PGD-20 finds one.
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
    detail = f"planted adversarial examples found: {share:.1f} %; expected: at least 95 %; by noise: {by_chance:.1f} %"
    return Check("planted", share >= 95, share, detail)


def _frozen(model: nn.Module) -> FrozenTwin:
    return model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)


@torch.no_grad()
def _attacked(twin: FrozenTwin, x: Tensor, objective: Objective, config: AttackConfig, seed: int) -> Tensor:
    """Return the predictions ``(N,)`` after PGD. The start depends on the seed only."""
    return twin(pgd(twin, x, objective, config, seeding.stream(x.device, seed, "checks"))).argmax(1)


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()
