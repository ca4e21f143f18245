"""``--accumulate``: a step in micro-batches equals the step on the whole batch, in less memory."""

import contextlib
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers.float64_distillation import teacher_classifier
from helpers.three_steps import CLASSES, COUNTS, EPS, HARDWARE, batch, toy_classifier, train_step
from helpers.toy_stage import Method as ToyMethod
from helpers.toy_stage import assert_same_outcome, outcome, send, stage
from ltat_fast.attacks import AttackConfig, n_fgsm
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.methods.igd import Igd
from ltat_fast.methods.ltat import Ltat
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.reat import Reat
from ltat_fast.methods.rslad import Rslad
from ltat_fast.methods.taet import Taet
from ltat_fast.models.classifier import ImageClassifier
from ltat_fast.signals import Interrupted
from ltat_fast.training import fit, replay, speed
from ltat_fast.training.backend import choose_backend
from ltat_fast.training.step import TrainStep, make_optimizer

ALL = {"awp": 0.01, "ema": 0.9, "eps_balance": 0.3}
CASES = {
    **METHODS,
    "reat, pairwise": lambda: Reat(tail_form="pairwise"),
    "taet, both stages": lambda: Taet(attack_begin=0.5),
    "igd, finite differences": lambda: Igd(form="finite-difference"),
    "ltat with kl": lambda: Ltat(kl_weight=0.7, kl_prior=True),
    "pgd-at with igdm": lambda: PgdAt(igdm_alpha=5.0),
}


class WithoutNorm(ImageClassifier):
    """Two convolutions without batch norm, for 6x6 images."""

    def __init__(self):
        super().__init__(8, CLASSES)
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def feature_maps(self, x):
        return F.softplus(self.conv2(F.softplus(self.conv1(x))))


def without_norm(method) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = method.wrap_model(WithoutNorm(), torch.tensor(COUNTS))
        for p in net.fc.parameters():
            p.data *= 4
    return net.double()


def after_two_steps(make, accumulate: int, attack: AttackConfig | None = None, **settings) -> dict[str, torch.Tensor]:
    """Everything that two steps of 16 images change, and the sums that they log."""
    method = make()
    net = without_norm(method)
    step = train_step(method, net, teacher=teacher_classifier(), accumulate=accumulate, **settings)
    step.attack = attack or step.attack
    for seed, progress in enumerate((0.4, 0.8)):
        step(*batch(seed), lr=0.1, progress=progress, seed=seed)
    momenta = {str(i): state["momentum_buffer"] for i, state in enumerate(step.optimizer.state.values())}
    state = {name: tensor.detach() for name, tensor in (method.state() | step.modifiers.state()).items()}
    return net.state_dict() | momenta | state | step.sums | {"x_adv": step.perturb(*batch(5))}


def assert_equal(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-10, rtol=1e-10, msg=lambda m, n=name: f"{n} {m}")


@pytest.mark.parametrize("settings", [{}, ALL], ids=["alone", "modified"])
@pytest.mark.parametrize("name", CASES)
def test_four_micro_batches_equal_one_batch(name, settings):
    whole, parts = (after_two_steps(CASES[name], n, **settings) for n in (1, 4))
    assert_equal(parts, whole)
    assert not torch.equal(whole["fc.weight"], without_norm(CASES[name]()).fc.weight)


@pytest.mark.parametrize("parts", [2, 16])
@pytest.mark.parametrize(("name", "smoothing"), [("ltat", 0.1), ("reat", 0.1), ("taet", 0.0)])
def test_so_do_two_and_sixteen_also_with_smoothed_labels(name, smoothing, parts):
    runs = (after_two_steps(METHODS[name], n, label_smoothing=smoothing) for n in (parts, 1))
    assert_equal(*runs)


def test_so_does_the_noise_of_n_fgsm_with_budgets():
    runs = (after_two_steps(PgdAt, n, n_fgsm(EPS), eps_balance=0.4) for n in (4, 1))
    assert_equal(*runs)


def test_a_loss_that_couples_images_would_differ_without_its_mark(monkeypatch):
    monkeypatch.setattr(Taet, "couples_images", False)
    whole, parts = (after_two_steps(METHODS["taet"], n)["fc.weight"] for n in (1, 4))
    assert (whole - parts).abs().max() > 1e-4


@pytest.mark.parametrize("make", [PgdAt, Reat], ids=["pgd-at", "reat"])
def test_batch_norm_takes_its_statistics_from_each_micro_batch_once(make):
    method = make()
    net = toy_classifier(method)
    step = train_step(method, net, accumulate=4, awp=0.01)
    mean, counted = net.bn.running_mean.clone(), net.bn.num_batches_tracked.clone()
    seen = []
    net.bn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    step(*batch(), lr=0.0, progress=1.0, seed=0)
    for images in seen[-4:]:
        assert len(images) == 4
        mean.lerp_(images.mean((0, 2, 3)), net.bn.momentum)
    torch.testing.assert_close(net.bn.running_mean, mean, atol=1e-12, rtol=0)
    assert net.bn.num_batches_tracked == counted + 4


def test_the_teacher_of_rslad_sees_each_clean_image_once():
    method, seen = Rslad(), []
    step = train_step(method, without_norm(method), teacher=teacher_classifier(), accumulate=4)
    teacher = method.context.teacher
    method.context.teacher = lambda x: seen.append(x) or teacher(x)
    step(*batch(), lr=0.1, progress=1.0, seed=0)
    assert torch.equal(torch.cat(seen), batch()[0])


def test_both_passes_of_a_coupled_loss_draw_the_same_dropout():
    """With other masks in the second pass, a gradient would belong to another network than its loss."""

    class WithDropout(WithoutNorm):
        draws_in_training = True

        def feature_maps(self, x):
            maps = F.dropout(super().feature_maps(x), 0.5, self.training)
            seen.append(maps.detach())
            return maps

    seen, method = [], Taet(attack_begin=0.0)
    step = train_step(method, WithDropout().double(), accumulate=4)
    seen.clear()
    step(*batch(), lr=0.1, progress=1.0, seed=0)
    first, second = seen[-8:-4], seen[-4:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0] == 0, first[1] == 0)


def test_the_largest_tensor_of_a_step_has_the_size_of_a_micro_batch():
    """Of all activations: only the images, their noise and the outputs have the whole batch."""
    for make in (Natural, PgdAt, Ltat, Reat, Taet):
        sizes, method = [], make()
        net = without_norm(method)
        step = train_step(method, net, teacher=teacher_classifier(), accumulate=4, awp=0.01)
        for network in (net, step.frozen, method.context.teacher):
            for module in network.modules() if network else ():
                module.register_forward_hook(lambda module, inputs, output, to=sizes: to.append(len(inputs[0])))
        step(*batch(), lr=0.1, progress=1.0, seed=0)
        assert set(sizes) <= {4, 8}, make  # LTAT's teacher gets x + d and x - d in one call


@pytest.mark.parametrize("make", [PgdAt, Taet], ids=["pgd-at", "taet"])
def test_processes_average_gradients_only_after_the_last_micro_batch(make):
    class Wrapped(nn.Module):
        """Stands in for DistributedDataParallel: records whether a forward pass with gradients is synchronised."""

        def __init__(self, net):
            super().__init__()
            self.net, self.synchronised, self.seen = net, True, []

        def forward(self, x):
            if torch.is_grad_enabled():
                self.seen.append(self.synchronised)
            return self.net(x)

        @contextlib.contextmanager
        def no_sync(self):
            self.synchronised = False
            yield
            self.synchronised = True

    method = make()
    plain = train_step(method, without_norm(method), accumulate=4, awp=0.01)
    wrapped = Wrapped(plain.model)
    step = TrainStep(
        plain.model,
        method,
        plain.optimizer,
        plain.attack,
        HARDWARE,
        train_model=wrapped,
        modifiers=plain.modifiers,
        accumulate=4,
    )
    step(*batch(), lr=0.1, progress=1.0, seed=0)
    assert wrapped.seen == 2 * [False, False, False, True]  # AWP, then the update


def test_a_batch_that_does_not_split_evenly_is_refused():
    step = train_step(PgdAt(), without_norm(PgdAt()), accumulate=3)
    with pytest.raises(ValueError, match="16 images does not split evenly into 3 micro-batches"):
        step(*batch(), lr=0.1, progress=1.0, seed=0)


@pytest.mark.parametrize("make", [pytest.param(Ltat, marks=pytest.mark.slow), Reat], ids=["ltat", "reat"])
def test_the_compiled_step_takes_the_same_step(make, capsys):
    outcomes = {}
    for backend in ("none", "step"):
        torch.compiler.reset()
        method = make()
        net = without_norm(method).float()
        method.setup(MethodContext(torch.tensor(COUNTS), teacher_classifier().float().eval()))
        optimizer = make_optimizer(net, 0.1, 0.9, 5e-4)

        def build(name, method=method, net=net, optimizer=optimizer):
            attack = AttackConfig(0.1, 0.05, 2)
            return TrainStep(net, method, optimizer, attack, HARDWARE, name, accumulate=4)

        x, y = batch()
        step = choose_backend(backend, build, x.float(), y)
        step(x.float(), y, lr=0.1, progress=1.0, seed=0)
        outcomes[step.backend] = net.state_dict()
    assert outcomes.keys() == {"eager", "step"}, capsys.readouterr().out
    for name, tensor in outcomes["eager"].items():
        torch.testing.assert_close(outcomes["step"][name], tensor, atol=1e-4, rtol=1e-3)


def test_operations_are_counted_as_without_micro_batches_plus_one_forward_of_a_coupled_loss():
    def flops(make, accumulate):
        method = make()
        step = train_step(method, without_norm(method), teacher=teacher_classifier(), accumulate=accumulate)
        return speed.flops_per_image(step, *batch())

    assert flops(PgdAt, 4) == flops(PgdAt, 1)
    forward = speed.FlopCounter()
    with forward, torch.no_grad():
        without_norm(PgdAt())(batch()[0])
    assert flops(Reat, 4) == pytest.approx(flops(Reat, 1) + forward.total / 16)


# -- runs ---------------------------------------------------------------------------------------------------------


def test_a_stage_in_micro_batches_says_what_batch_norm_sees_and_resumes_bit_equal(tmp_path, capsys, unmeasured):
    fit.fit(stage(tmp_path / "whole", accumulate=2), HARDWARE)
    assert "student: --accumulate 2: batch norm takes its statistics from 4 images, not 8" in capsys.readouterr().out
    with pytest.raises(Interrupted):
        fit.fit(
            stage(tmp_path / "killed", ToyMethod(send(signal.SIGTERM, at=20)), accumulate=2, save_minutes=1e-9),
            HARDWARE,
        )
    fit.fit(stage(tmp_path / "killed", accumulate=2), HARDWARE)
    assert_same_outcome(outcome(tmp_path / "killed"), outcome(tmp_path / "whole"))


def test_a_step_in_micro_batches_is_replayed():
    of = stage(None, ToyMethod(lambda number: (lambda model, loss: loss * float("nan")) if number == 6 else None))
    step = TrainStep(of.model, of.method, make_optimizer(of.model, 0.1, 0.9, 5e-4), of.attack, HARDWARE, accumulate=4)
    x, y = next(of.loader.batches(0))
    assert replay.examine(step, x, y, of.step_arguments(0, 0)) == []
    assert replay.examine(step, x, y, of.step_arguments(0, 0))[0] == "loss (1 of 1 values)"
