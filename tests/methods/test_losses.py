"""Properties of the losses of PGD-AT, AT-BSL and LTAT that hold for any numbers."""

import pytest
import torch
from torch import nn

from helpers.toy_networks import images, labels, small_net
from ltat_fast.errors import UserError
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.pgd_at import PgdAt

HALF = torch.tensor(0.5)
COUNTS = torch.tensor([40, 11, 3])


def ready(method, counts=COUNTS, teacher=None):
    method.setup(MethodContext(counts, teacher))
    return method


def loss_and_gradient(method, net, x, x_adv, y, progress=HALF):
    net.zero_grad()
    loss, parts = method.loss(net, x, x_adv, y, progress)
    loss.backward()
    return loss.item(), parts, [p.grad.clone() for p in net.parameters()]


def batch(n=12):
    x = images(n)
    return x, (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).sign()).clamp(0, 1), labels(n)


def test_at_bsl_with_equal_counts_is_pgd_at():
    net, (x, x_adv, y) = small_net().eval(), batch()
    pgd_at, _, pgd_at_gradient = loss_and_gradient(ready(PgdAt()), net, x, x_adv, y)
    bsl, _, gradient = loss_and_gradient(ready(AtBsl(tau=1.3), torch.tensor([17, 17, 17])), net, x, x_adv, y)
    assert bsl == pytest.approx(pgd_at, rel=1e-6)
    torch.testing.assert_close(gradient, pgd_at_gradient)
    unequal, _, _ = loss_and_gradient(ready(AtBsl()), net, x, x_adv, y)
    assert abs(unequal - pgd_at) > 0.01


def test_ltat_without_its_teacher_terms_is_at_bsl():
    net, (x, x_adv, y) = small_net().eval(), batch()
    bsl, _, bsl_gradient = loss_and_gradient(ready(AtBsl()), net, x, x_adv, y)

    def teacher(x):
        raise AssertionError("the teacher must not be called")

    ltat, parts, gradient = loss_and_gradient(ready(Ltat(alpha=0.0), teacher=teacher), net, x, x_adv, y)
    assert ltat == pytest.approx(bsl, rel=1e-7)
    torch.testing.assert_close(gradient, bsl_gradient, atol=0, rtol=0)
    assert set(parts) == {"bsl"}


def test_matching_the_student_with_itself_adds_no_gradient():
    net, (x, x_adv, y) = small_net().eval(), batch()
    _, _, bsl_gradient = loss_and_gradient(ready(AtBsl()), net, x, x_adv, y)
    _, parts, gradient = loss_and_gradient(ready(Ltat(alpha=100.0), teacher=net), net, x, x_adv, y)
    assert abs(parts["igdm"].item()) < 1e-6
    torch.testing.assert_close(gradient, bsl_gradient, atol=2e-5, rtol=1e-5)


def test_distilling_from_the_student_itself_adds_no_gradient():
    net, (x, x_adv, y) = small_net().eval(), batch()
    bsl, _, bsl_gradient = loss_and_gradient(ready(AtBsl()), net, x, x_adv, y)
    loss, _, gradient = loss_and_gradient(ready(Ltat(alpha=0.0, kl_weight=10.0), teacher=net), net, x, x_adv, y)
    assert loss == pytest.approx(bsl, abs=1e-5)
    torch.testing.assert_close(gradient, bsl_gradient, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("ramp", "share"), [("linear", 0.25), ("constant", 1.0)])
def test_alpha_ramps_with_progress(ramp, share):
    net, teacher, (x, x_adv, y) = small_net().eval(), small_net(seed=2).eval(), batch()
    method = ready(Ltat(alpha=8.0, ramp=ramp), teacher=teacher)
    loss, parts = method.loss(net, x, x_adv, y, torch.tensor(0.25))
    assert parts["igdm"] > 1e-4
    assert loss.item() == pytest.approx((parts["bsl"] + 8.0 * share * parts["igdm"]).item(), rel=1e-6)


class Recorder(nn.Module):
    """A classifier that records its inputs."""

    def __init__(self):
        super().__init__()
        self.fc, self.seen = nn.Linear(4, 3), []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.fc(x.flatten(1))


def test_the_mirrored_point_is_not_clipped():
    x = torch.tensor([[0.0, 1.0, 0.5, 0.02]])
    x_adv = torch.tensor([[0.1, 0.9, 0.6, 0.12]])
    student, teacher = Recorder(), Recorder()
    ready(Ltat(), teacher=teacher).loss(student, x, x_adv, torch.tensor([0]), HALF)
    mirrored = torch.tensor([[-0.1, 1.1, 0.4, -0.08]])
    # The student has one call per point, for its batch norm. The teacher may take both points in one call.
    assert len(student.seen) == 2
    torch.testing.assert_close(student.seen[0], x_adv)
    torch.testing.assert_close(student.seen[1], mirrored)
    torch.testing.assert_close(torch.cat(teacher.seen), torch.cat([x_adv, mirrored]))


@pytest.mark.parametrize(
    "options", [{"alpha": 5.0}, {"alpha": 0.0, "kl_weight": 1.0}, {"alpha": 5.0, "kl_weight": 1.0}]
)
def test_the_teacher_gets_no_gradient(options):
    net, teacher, (x, x_adv, y) = small_net(), small_net(seed=2).eval(), batch()
    loss, parts = ready(Ltat(**options), teacher=teacher).loss(net, x, x_adv, y, HALF)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in net.parameters())
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("method", [PgdAt, AtBsl, Ltat])
def test_bf16_logits_give_a_float32_loss(method):
    method = ready(method(), teacher=lambda x: torch.zeros(len(x), 3))
    x = images(4)
    loss, _ = method.loss(lambda x: x.flatten(1)[:, :3].bfloat16().requires_grad_(), x, x, labels(4), HALF)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (AtBsl(tau=-1.0), "--tau must be 0 or more and finite, not -1"),
        (AtBsl(tau=float("inf")), "--tau must be 0 or more and finite, not inf"),
        (Ltat(alpha=float("nan")), "--alpha must be 0 or more and finite, not nan"),
        (Ltat(kl_weight=-0.5), "--kl-weight must be 0 or more and finite, not -0.5"),
        (Ltat(temperature=0.0), "--temperature must be above 0, not 0"),
    ],
)
def test_invalid_options_are_refused(method, words):
    with pytest.raises(UserError, match=words):
        method.check()


def test_valid_options_are_accepted():
    for method in METHODS.values():
        method().check()
    Ltat(alpha=0.0, kl_weight=0.0, tau=0.0).check()
