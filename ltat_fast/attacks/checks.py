"""Checks against false confidence: can the robust accuracy that gradient attacks measure on a model be trusted?

If an attack fails, either the image is robust or the attack is weak. Each check looks for one known cause of a weak
attack, on a few dozen images. Sources: Carlini et al., "On Evaluating Adversarial Robustness", 2019, arXiv 1902.06705;
Athalye, Carlini, Wagner, "Obfuscated Gradients Give a False Sense of Security", ICML 2018; Zimmermann et al.,
"Increasing Confidence in Adversarial Robustness Evaluations", NeurIPS 2022.

The checks take any ``nn.Module`` from images ``(N, C, H, W)``, float32 in [0, 1], to logits ``(N, K)``. They evaluate
it in eval mode; only :func:`check_invariance` uses the mode that the model is in. No check changes the model.

All eight together cost about 130 gradients per image. On 64 images that is the cost of AutoAttack on four images.
:func:`check_gap` compares the results of the attacks afterwards.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltat_fast import seeding
from ltat_fast.attacks.objectives import Objective, scaled_cross_entropy
from ltat_fast.attacks.pgd import AttackConfig, pgd
from ltat_fast.models.frozen import FrozenTwin

STEPS = (1, 10, 50)
FAMILIES = {"pgd": r"(scaled-)?pgd\d.*", "cw": r"cw\d.*", "autoattack": r"autoattack.*"}
"""attacks that :func:`check_gap` compares: names by kind"""


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


def run_checks(
    model: nn.Module, x: Tensor, labels: Tensor, eps: float, *, seed: int = 0, batch_size: int | None = None
) -> list[Check]:
    """Run all checks and return their results, in the order in which they should be read.

    x: float32 images ``(N, C, H, W)``; 64 to 128 images, of all classes. labels: int64 ``(N,)``. eps: radius of the
    L_inf ball of the evaluation. seed: seed of the noise and of the planted examples. batch_size: that of the
    evaluation; logits and gradients must be the same in a batch of this size.
    """
    twin = _frozen(model)
    return [
        check_range(x),
        check_invariance(model, x, batch_size=batch_size),
        check_logits(twin, x),
        check_bounded(twin, x),
        check_gradients(twin, x, labels, batch_size=batch_size),
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
def check_invariance(model: nn.Module, x: Tensor, *, batch_size: int | None = None, tolerance: float = 1e-3) -> Check:
    """Check that the logits of an image depend only on that image.

    No module may be in train mode, and the logits must be the same in a second call, in another order, in smaller
    batches, and in a batch of ``batch_size`` images. Batch statistics and random layers violate this. Use
    autoattack-rand for a model that is random on purpose.
    value: largest difference, as a share of the largest logit.
    """
    training = 0 if isinstance(model, FrozenTwin) else sum(module.training for module in model.modules())
    before = [buffer.clone() for buffer in model.buffers()]
    logits = model(x)
    others = [model(x), model(x.flip(0)).flip(0), torch.cat([model(part) for part in x.split(len(x) // 3 + 1)])]
    if batch_size and batch_size > len(x):
        others.append(model(_repeated(x, batch_size))[: len(x)])
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
    """Check that the outputs are logits: finite, and not probabilities or log-probabilities.

    A softmax inside the model removes the gradient of confident images and makes margins and the DLR loss meaningless.
    value: the smaller of two distances, each the largest over images: of the outputs' sum from 1 (infinite if an output
    is negative), and of the outputs' log-sum-exp from 0. 0 if outputs are not finite.
    """
    z = _frozen(model)(x)
    if broken := int((~z.isfinite().all(1)).sum()):
        detail = f"{broken} of {len(x)} images have outputs that are not finite, and count as wrong; expected: none"
        return Check("logits", False, 0.0, detail)
    as_probabilities = (z.sum(1) - 1).abs().amax().item() if z.amin() >= 0 else torch.inf
    distance = min(as_probabilities, z.logsumexp(1).abs().amax().item())
    detail = f"distance of the outputs from (log-)probabilities: {distance:.2g}; expected: more than {tolerance:g}"
    return Check("logits", distance > tolerance, distance, detail)


@torch.no_grad()
def check_bounded(model: nn.Module, x: Tensor, *, share: float = 25.0, near: float = 1e-3) -> Check:
    """Check that the outputs do not pile up at a bound.

    A function such as tanh, sigmoid or clamp after the logits has almost no derivative at its bounds: gradients of
    confident images vanish, and margins and the loss of PGD are of the same size for all of them. The largest outputs
    of the images, or the smallest ones, are then nearly the same number. An output is at the bound if it is within
    ``near`` of the most extreme output of all, as a share of the range of the outputs.
    value: percent of images whose largest output, or whose smallest output, is at the bound; the larger of both.
    """
    z = _frozen(model)(x)
    low, high = z.amin(), z.amax()
    room = near * (high - low)
    piled = max(_percent(z.amax(1) >= high - room), _percent(z.amin(1) <= low + room))
    detail = f"images whose largest or smallest output is at a bound: {piled:.1f} %; expected: at most {share:g} %"
    return Check("bounded", piled <= share, piled, detail)


def check_gradients(model: nn.Module, x: Tensor, labels: Tensor, *, batch_size: int | None = None) -> Check:
    """Check that cross-entropy has a usable gradient at every image: finite, not zero everywhere, and always the same.

    Sign attacks do not move without one. One cause is a saturated softmax; then scaled-pgd and autoattack (its DLR
    loss) still work. Another cause is rounding or any other operation without a derivative. A gradient that changes in
    a second call, or in a batch of ``batch_size`` images, is noise or depends on the batch: its cosine with the first
    one must be 0.9 or more. Rounding can change it a little.
    value: percent of images without a usable gradient.
    """
    twin = _frozen(model)

    def gradient(images: Tensor, y: Tensor) -> Tensor:
        point = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(twin(point), y, reduction="sum")
        return torch.autograd.grad(loss, point)[0].flatten(1)[: len(x)]

    first, others = gradient(x, labels), [gradient(x, labels)]
    if batch_size and batch_size > len(x):
        others.append(gradient(_repeated(x, batch_size), _repeated(labels, batch_size)))
    largest = first.abs().amax(1)
    usable = (largest > 0) & largest.isfinite()
    dead = _percent(~usable)
    for other in others:
        usable &= _cosine(first, other) >= 0.9
    bad = _percent(~usable & (largest > 0) & largest.isfinite())
    detail = f"{dead:.1f} % of images have no usable input gradient, {bad:.1f} % one that changes; expected: none"
    return Check("gradients", dead == 0 and bad <= 5, dead + bad, detail)


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


def compared_family(attack: str) -> str | None:
    """Return the kind of ``attack`` that :func:`check_gap` compares: "pgd", "cw", "autoattack" or None."""
    return next((family for family, pattern in FAMILIES.items() if re.fullmatch(pattern, attack)), None)


def check_gap(correct: Mapping[str, Tensor], *, own: float = 8.0, autoattack: float = 8.0) -> Check | None:
    """Check that the attacks agree about how robust the network is; None if there are no two attacks to compare.

    correct: by the name of the attack, which of the same images are classified correctly, bool ``(N,)``. Attacks with
    the gradient of the cross-entropy (pgd) and of the margin (cw) should leave about the same accuracy, and AutoAttack
    should not leave much less than the better of them. Large differences mean that gradients are masked for some loss,
    and that the attacks with higher accuracy failed. own, autoattack: allowed differences in percentage points.
    value: by how much the largest difference exceeds its limit, in percentage points.
    """
    best: dict[str, tuple[float, str]] = {}  # of each kind: the lowest accuracy, and the attack
    for name, hits in correct.items():
        if family := compared_family(name):
            best[family] = min(best.get(family, (torch.inf, "")), (_percent(hits), name))
    pairs = []
    if "pgd" in best and "cw" in best:
        pairs.append((*sorted((best["pgd"], best["cw"]), reverse=True), own))
    gradient = min((best[family] for family in ("pgd", "cw") if family in best), default=None)
    if gradient and "autoattack" in best:
        pairs.append((gradient, best["autoattack"], autoattack))
    if not pairs:
        return None
    higher, lower, limit = max(pairs, key=lambda pair: pair[0][0] - pair[1][0] - pair[2])
    value = higher[0] - lower[0] - limit
    found = f"{higher[1]} {higher[0]:.1f} %, {lower[1]} {lower[0]:.1f} %"
    return Check("gap", value <= 0, value, f"accuracy: {found}; expected: at most {limit:g} points apart")


def _frozen(model: nn.Module) -> FrozenTwin:
    return model if isinstance(model, FrozenTwin) else FrozenTwin(model, fold_bn=False)


@torch.no_grad()
def _attacked(twin: FrozenTwin, x: Tensor, objective: Objective, config: AttackConfig, seed: int) -> Tensor:
    """Return the predictions ``(N,)`` after PGD. The start depends on the seed only."""
    return twin(pgd(twin, x, objective, config, seeding.stream(x.device, seed, "checks"))).argmax(1)


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _repeated(t: Tensor, number: int) -> Tensor:
    """Return ``number`` rows, those of ``t`` again and again."""
    return t[torch.arange(number, device=t.device) % len(t)]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine between the rows of ``a`` and ``b``, ``(N, D)``, ``(N,)``; NaN where one is zero."""
    a, b = (v / v.abs().amax(1, keepdim=True) for v in (a.double(), b.double()))
    return F.cosine_similarity(a, b)
