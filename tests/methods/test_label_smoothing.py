"""Label smoothing: training equals the formula, every label term is smoothed, methods without one refuse it."""

import pytest
import torch
from torch import Tensor

from helpers.float64_distillation import Float64Distillation, teacher_classifier
from helpers.three_steps import (
    COUNTS,
    Float64Method,
    N,
    assert_three_steps_equal,
    batch,
    toy_classifier,
    train_step,
)
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.methods import METHODS
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.ltat import Ltat

S = 0.3


def smoothed(z: Tensor, y: Tensor, s: float) -> Tensor:
    """Cross-entropy with the target (1 - s) onehot(y) + s / K."""
    target = (1 - s) * torch.eye(z.shape[1], dtype=torch.float64)[y] + s / z.shape[1]
    return -(target * z.softmax(1).log()).sum(1).mean()


class Float64AtBsl(Float64Method):
    def loss(self, x, x_adv, y):
        return smoothed(self.logits(x_adv) + N.log(), y, S)


class Float64Ltat(Float64Distillation):
    """The attack, inherited, ascends cross-entropy with hard labels."""

    def base(self, adv, x, x_adv, y):
        loss = smoothed(adv + N.log(), y, S)
        p = self.teacher_logits(x_adv).softmax(1)
        return loss + self.options["kl_weight"] * (p * (p.log() - adv.log_softmax(1))).sum(1).mean()


def test_three_steps_of_at_bsl_equal_the_formula():
    assert_three_steps_equal(AtBsl(), Float64AtBsl, label_smoothing=S)


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_three_steps_of_ltat_equal_the_formula(kl_weight):
    assert_three_steps_equal(
        Ltat(alpha=20.0, kl_weight=kl_weight),
        lambda net: Float64Ltat(net, {"igdm_alpha": 20.0, "kl_weight": kl_weight}),
        teacher=teacher_classifier(),
        label_smoothing=S,
    )


def robal_logits(clean, adv, y):
    """u of the configuration R for CIFAR-10: margin 0.1, tau_m 0.3, tau_b 1.5, scale 10."""
    margins = 0.1 + 0.3 / 10 * (N / N.min()).log()
    return 10 * (adv - margins * torch.eye(len(N))[y]) + 1.5 * (N / N.sum()).log()


# method, options, logits of its label term (from those on clean and adversarial images), weight of the label term
LABEL_TERMS = [
    ("natural", {}, lambda clean, adv, y: clean, 1.0),
    ("pgd-at", {}, lambda clean, adv, y: adv, 1.0),
    ("trades", {}, lambda clean, adv, y: clean, 1.0),
    ("trades", {"balanced": True}, lambda clean, adv, y: clean + N.log(), 1.0),
    ("mart", {}, lambda clean, adv, y: adv, 1.0),
    ("mart", {"balanced": True}, lambda clean, adv, y: adv + N.log(), 1.0),
    ("awp", {}, lambda clean, adv, y: adv, 1.0),
    ("taet", {"attack_begin": 0.9}, lambda clean, adv, y: clean, 1.0),
    ("robal", {}, robal_logits, 1.0),
    ("reat", {}, lambda clean, adv, y: adv + N.log(), 1.0),
    ("at-bsl", {"tau": 0.5}, lambda clean, adv, y: adv + 0.5 * N.log(), 1.0),
    ("ltat", {"alpha": 3.0}, lambda clean, adv, y: adv + N.log(), 1.0),
    ("ard", {"teacher_weight": 0.6}, lambda clean, adv, y: clean, 0.4),
    ("iad", {"teacher_weight": 0.6}, lambda clean, adv, y: clean, 0.4),
    ("adaiad", {"teacher_weight": 0.6}, lambda clean, adv, y: clean, 0.4),
    ("akd", {}, lambda clean, adv, y: adv, 0.5),
    ("igd", {}, lambda clean, adv, y: adv, 1.0),
]


@pytest.mark.parametrize(("name", "options", "logits", "weight"), LABEL_TERMS)
def test_only_the_label_term_is_smoothed(name, options, logits, weight):
    losses, (x, y) = [], batch()
    x_adv = (x + 0.1).clamp(0, 1)
    for s in (0.0, S):
        method = METHODS[name](**options)
        net = toy_classifier(method)
        net.features_in_training = False
        train_step(method, net, teacher=teacher_classifier(), label_smoothing=s)
        assert method.smooths_labels
        net.eval()
        if name == "robal":
            net.fc.train()  # the cosines of train mode

        def student(x, net=net, name=name):
            return (net(x), net.features(x)) if name == "reat" else net(x)

        losses.append(method.loss(student, x, x_adv, y, torch.tensor(0.5))[0])
    z = logits(net(x), net(x_adv), y)
    expected = weight * (smoothed(z, y, S) - smoothed(z, y, 0.0))
    assert abs(expected) > 0.01
    difference = (losses[1] - losses[0]).double()  # pgd-at and natural use float32
    torch.testing.assert_close(difference, expected, atol=2e-6, rtol=1e-6)


def test_a_class_without_images_does_not_make_a_balanced_loss_infinite():
    counts = torch.tensor(COUNTS).index_fill(0, torch.tensor([3]), 0)
    x, y = batch()
    for method in (AtBsl(), METHODS["trades"](balanced=True), METHODS["mart"](balanced=True)):
        net = toy_classifier(method)
        train_step(method, net, label_smoothing=S)
        method.context.class_counts = counts
        loss, _ = method.loss(net, x, x, y.masked_fill(y == 3, 0), None)
        assert loss.isfinite()


REFUSING = [("rslad",), ("adaad",), *((name, "--teacher-weight", "1") for name in ("ard", "iad", "adaiad", "akd"))]


@pytest.mark.parametrize("flags", REFUSING, ids=" ".join)
def test_a_method_without_a_label_term_refuses_it(flags):
    words = f"^--label-smoothing: the loss of --method {flags[0]} with these options has no label term$"
    with pytest.raises(UserError, match=words):
        parse_args(["--method", *flags, "--label-smoothing", "0.1"])
    parse_args(["--method", *flags, "--label-smoothing", "0"])


def test_every_method_is_tested():
    assert {case[0] for case in LABEL_TERMS} | {flags[0] for flags in REFUSING} == set(METHODS)
