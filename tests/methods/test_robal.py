"""RoBal against its formulas in each configuration; the exported network, in memory and from a file."""

import json

import pytest
import torch
from safetensors.torch import load_file

from helpers import train_runs
from helpers.three_steps import (
    COUNTS,
    HARDWARE,
    Float64Method,
    N,
    assert_three_steps_equal,
    batch,
    cross_entropy,
    kl,
    picked,
    toy_classifier,
    train_step,
)
from ltat_fast import config as configuration
from ltat_fast.errors import UserError
from ltat_fast.flags import parse_args
from ltat_fast.methods.robal import Robal
from ltat_fast.runs.splits import load_splits
from ltat_fast.runs.weights import load_model
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import frozen_twin


def float64_robal(m, s, tau_b, tau_m, beta, g) -> type[Float64Method]:
    class Float64Robal(Float64Method):
        def logits(self, x):
            h, w = self.net.features(x), self.net.fc.weight
            rows = [row / row.norm() for row in h]
            return torch.stack([torch.stack([row @ (v / (v.norm() + g)) for v in w]) for row in rows])

        def loss(self, x, x_adv, y):
            clean, adv = self.logits(x), self.logits(x_adv)
            u = s * adv
            if tau_b > 0:
                u = u + tau_b * (N / N.sum()).log()
            margins = torch.zeros_like(u)
            for i, label in enumerate(y.tolist()):
                margins[i, label] = m + tau_m / s * (N[label] / N.min()).log()
            u = u - s * margins
            return cross_entropy(u, y) + beta * kl(clean.softmax(1), adv.softmax(1))

    return Float64Robal


@pytest.mark.parametrize("posthoc", [True, False])
@pytest.mark.parametrize(
    ("dataset", "config", "numbers"),
    [
        ("cifar10", "N", (0.1, 10, 1.2, 0, 6, 0.03125)),
        ("cifar10", "R", (0.1, 10, 1.5, 0.3, 6, 0.03125)),
        ("cifar100", "N", (0.2, 10, 0, 0, 3, 0.03125)),
        ("cifar100", "R", (0.3, 10, 0, 0, 6, 0.0625)),
    ],
)
def test_three_steps_equal_the_formulas(dataset, config, numbers, posthoc):
    """The attacked network exports shifted logits, but the attack ascends the loss of the plain cosines."""
    method = Robal(robal_config=config, robal_dataset=dataset, posthoc=posthoc)
    assert method.noise == "uniform"
    assert_three_steps_equal(method, float64_robal(*numbers), tolerance=1e-6)


def test_single_numbers_can_be_changed():
    method = Robal(margin=0.25, tau_b=0.7, tau_m=0.9, beta=2.0, norm_offset=0.5, scale=5.0, tau_p=3.0)
    assert_three_steps_equal(method, float64_robal(0.25, 5.0, 0.7, 0.9, 2.0, 0.5), tolerance=1e-6)


EXPORTS = [
    ({"robal_config": "N"}, 10.0, 0.1),
    ({"robal_config": "R"}, 1.0, 0.0),
    ({"robal_dataset": "cifar100", "robal_config": "N"}, 10.0, 1.5),
    ({"robal_dataset": "cifar100", "robal_config": "R"}, 10.0, 1.7),
    ({"robal_dataset": "cifar100", "posthoc": False}, 1.0, 0.0),
    ({"robal_config": "R", "tau_p": 1.3, "scale": 4.0}, 4.0, 1.3),
]


@pytest.mark.parametrize(("options", "scale", "tau_p"), EXPORTS)
def test_the_exported_model_includes_its_shift(options, scale, tau_p):
    """Eval mode gives shifted logits; train mode gives the plain cosines."""
    net = toy_classifier(Robal(**options)).eval()
    g = Robal(**options).numbers.norm_offset
    x, _ = batch()
    h, w = net.features(x), net.fc.weight
    cosines = (h / h.norm(dim=1, keepdim=True)) @ (w / (w.norm(dim=1, keepdim=True) + g)).T
    torch.testing.assert_close(net(x), scale * cosines - tau_p * (N / N.sum()).log(), atol=1e-6, rtol=1e-6)
    assert cosines.abs().max() < 1
    torch.testing.assert_close(net.fc.train()(h), cosines, atol=1e-12, rtol=0)


def test_a_bf16_frozen_twin_exports_the_same_shift():
    net = toy_classifier(Robal(robal_dataset="cifar100")).float().eval()
    twin = frozen_twin(net, Hardware(HARDWARE.device, torch.bfloat16, ""))
    assert torch.equal(twin.net.fc.shift, net.fc.shift)
    x = batch()[0].float()
    torch.testing.assert_close(twin(x), net(x), atol=0.1, rtol=0)


def test_an_image_without_features_has_finite_logits_and_gradients():
    method = Robal()
    net = toy_classifier(method)
    features = torch.zeros(2, 8, dtype=torch.float64, requires_grad=True)
    logits = net.fc(features)
    logits.sum().backward()
    assert torch.equal(logits, torch.zeros_like(logits))
    assert features.grad.isfinite().all()


def test_a_margin_lowers_only_the_logit_of_the_true_class():
    method = Robal(margin=0.4, tau_m=0.0, tau_b=0.0, beta=0.0)
    net = toy_classifier(method)
    train_step(method, net)
    x, y = batch()
    cosines = net.train()(x)
    true = 10 * picked(cosines, y)
    others = (10 * cosines).exp().sum(1) - true.exp()
    expected = ((others + (true - 4).exp()).log() - (true - 4)).mean()
    assert method.loss(net, x, x, y, None)[0].item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.fixture(scope="module")
def robal_run(tmp_path_factory):
    """An evaluated run with two steps of RoBal N on the digits."""
    out = tmp_path_factory.mktemp("robal") / "run"
    flags = ("--max-steps", "2", "--epochs", "1", "--eval-attacks", "clean", "--limit-eval", "50")
    assert train_runs.train("--method", "robal", "--robal-config", "N", "--tau-p", "2", "--out", str(out), *flags) == 0
    return out


def test_a_saved_run_exports_its_shift_and_reloads(robal_run):
    config, _ = configuration.load(robal_run)
    data = load_splits(config, torch.device("cpu"))
    file = robal_run / "checkpoints" / "last.safetensors"
    model = load_model(file, torch.device("cpu"), config.arch, data).eval()
    tensors = load_file(file)
    n = torch.tensor(data.counts, dtype=torch.float64)
    shift = 2 * (n / n.sum()).log()
    torch.testing.assert_close(tensors["fc.shift"].double(), shift, atol=1e-6, rtol=0)

    x = data.test.images[:20].float() / 255
    with torch.no_grad():
        logits, h = model(x).double(), model.features(x).double()
    w = tensors["fc.weight"].double()
    cosines = (h / h.norm(dim=1, keepdim=True)) @ (w / (w.norm(dim=1, keepdim=True) + 0.03125)).T
    torch.testing.assert_close(logits, 10 * cosines - shift, atol=1e-4, rtol=0)
    card = json.loads((robal_run / "config.json").read_text())
    assert card["method_options"]["robal_config"] == "N"


def test_the_dataset_preset_selects_the_numbers():
    def numbers(*flags):
        return parse_args(["--method", "robal", *flags])[1].numbers

    assert numbers("--dataset", "cifar100-lt") == (0.3, 0.0, 0.0, 6.0, 0.0625, 1.7)
    assert numbers("--dataset", "cifar100-lt", "--robal-config", "N") == (0.2, 0.0, 0.0, 3.0, 0.03125, 1.5)
    assert numbers("--dataset", "tinyimagenet-lt") == numbers("--dataset", "cifar10-lt") == numbers()
    assert numbers("--robal-config", "N", "--tau-b", "0.5") == (0.1, 0.5, 0.0, 6.0, 0.03125, 0.1)


def test_invalid_options_are_refused():
    with pytest.raises(UserError, match="--scale must be above 0, not 0"):
        Robal(scale=0.0).check()
    with pytest.raises(UserError, match="--margin must be 0 or more and finite, not -1"):
        Robal(margin=-1.0).check()


def test_a_class_without_images_has_finite_margins_and_shift():
    method = Robal(robal_dataset="cifar100", tau_m=0.3, tau_b=1.0)
    _, shift = method.exported(torch.tensor([*COUNTS[:-1], 0]))
    assert shift.isfinite().all()
