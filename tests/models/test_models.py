"""The networks compared with the papers: parameter counts, FLOPs, and their formulas in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ltat_fast.errors import UserError
from ltat_fast.models import ARCHS, build_model
from ltat_fast.models.classifier import Normalize

# --- parameter counts, computed from the architecture tables ----------------------------------------------------------


def conv(k, cin, cout):
    return k * k * cin * cout


def bn(c):
    return 2 * c


def count_resnet(widths, depth, classes, cin):
    n = conv(3, cin, widths[0]) + bn(widths[0])
    for before, w in zip((widths[0], *widths[:-1]), widths, strict=True):
        n += conv(3, before, w) + (2 * depth - 1) * conv(3, w, w) + 2 * depth * bn(w)
        n += conv(1, before, w) + bn(w) if before != w else 0
    return n + (widths[-1] + 1) * classes


def count_preact(stem, widths, depth, classes, cin):
    n = conv(3, cin, stem)
    for before, w in zip((stem, *widths[:-1]), widths, strict=True):
        n += conv(3, before, w) + (2 * depth - 1) * conv(3, w, w) + bn(before) + (2 * depth - 1) * bn(w)
        n += conv(1, before, w) if before != w else 0
    return n + bn(widths[-1]) + (widths[-1] + 1) * classes


def count_mobilenetv2(classes, cin):
    n, before = conv(3, cin, 32) + bn(32), 32
    for t, w, repeats in ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1)):
        for _ in range(repeats):
            h = t * before
            n += conv(1, before, h) + bn(h) + conv(3, 1, h) + bn(h) + conv(1, h, w) + bn(w)
            before = w
    for a, b in ((32, 16), (16, 24), (64, 96), (160, 320)):  # stride 1 and a new width need a projection shortcut
        n += conv(1, a, b) + bn(b)
    return n + conv(1, 320, 1280) + bn(1280) + 1281 * classes


@pytest.mark.parametrize(
    ("arch", "classes", "cin", "formula", "published"),
    [
        ("resnet18", 10, 3, count_resnet((64, 128, 256, 512), 2, 10, 3), 11_173_962),
        ("preactresnet18", 200, 3, count_preact(64, (64, 128, 256, 512), 2, 200, 3), None),
        ("wrn-34-10", 100, 3, count_preact(16, (160, 320, 640), 5, 100, 3), None),
        ("mobilenetv2", 10, 3, count_mobilenetv2(10, 3), 2_296_922),
        ("smallresnet", 10, 1, count_resnet((16, 32, 64), 1, 10, 1), None),
    ],
)
def test_parameter_count(arch, classes, cin, formula, published):
    with torch.device("meta"):
        model = build_model(arch, classes, in_channels=cin)
    count = sum(p.numel() for p in model.parameters())
    assert count == formula
    assert published is None or count == published


def test_parameter_counts_in_millions_equal_the_published_ones():
    assert round(count_resnet((64, 128, 256, 512), 2, 10, 3) / 1e6, 2) == 11.17
    assert round(count_preact(64, (64, 128, 256, 512), 2, 200, 3) / 1e6, 2) == 11.27
    # The 48.3 M of public adversarial-training code include an unused second copy of the first stage.
    first_stage = count_preact(16, (160,), 5, 0, 0) - bn(160)
    assert round((count_preact(16, (160, 320, 640), 5, 100, 3) + first_stage) / 1e6, 1) == 48.3


@pytest.mark.parametrize(
    ("arch", "size", "gflops"), [("resnet18", 32, 1.11), ("preactresnet18", 64, 4.44), ("wrn-34-10", 32, 13.3)]
)
def test_forward_flops(arch, size, gflops):
    model = build_model(arch, 10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.rand(1, 3, size, size))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, rel=2.5e-3)


# --- the formulas of the networks, in float64 on a state dict ---------------------------------------------------------


class Formula:
    """Forward passes in eval mode that use only the weights of a model, by name, and none of its code."""

    def __init__(self, model, act=F.relu):
        self.act = act
        self.w = {name: t.double() for name, t in model.state_dict().items()}

    def conv(self, name, x, stride=1, groups=1):
        w = self.w[f"{name}.weight"]
        return F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2, groups=groups)

    def bn(self, name, x):
        mean, var, gamma, beta = (
            self.w[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gamma + beta

    def has(self, name):
        return any(key.startswith(name + ".") for key in self.w)

    def head(self, maps):
        return maps.flatten(2).mean(2) @ self.w["fc.weight"].T + self.w["fc.bias"]

    def resnet(self, x, depth, stages):
        x = self.act(self.bn("bn1", self.conv("conv1", x)))
        for i in range(depth * stages):
            b, stride = f"blocks.{i}", 2 if i > 0 and i % depth == 0 else 1
            out = self.act(self.bn(f"{b}.bn1", self.conv(f"{b}.conv1", x, stride)))
            out = self.bn(f"{b}.bn2", self.conv(f"{b}.conv2", out))
            if self.has(f"{b}.shortcut"):
                x = self.bn(f"{b}.shortcut.1", self.conv(f"{b}.shortcut.0", x, stride))
            x = self.act(out + x)
        return self.head(x)

    def preact(self, x, depth, stages):
        x = self.conv("conv1", x)
        for i in range(depth * stages):
            b, stride = f"blocks.{i}", 2 if i > 0 and i % depth == 0 else 1
            a = self.act(self.bn(f"{b}.bn1", x))
            out = self.conv(f"{b}.conv2", self.act(self.bn(f"{b}.bn2", self.conv(f"{b}.conv1", a, stride))))
            x = out + (self.conv(f"{b}.shortcut", a, stride) if self.has(f"{b}.shortcut") else x)
        return self.head(self.act(self.bn("bn", x)))

    def mobilenetv2(self, x):
        x = self.act(self.bn("bn1", self.conv("conv1", x)))
        strides = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1]
        for i, stride in enumerate(strides):
            b = f"blocks.{i}"
            out = self.act(self.bn(f"{b}.bn1", self.conv(f"{b}.expand", x)))
            out = self.act(self.bn(f"{b}.bn2", self.conv(f"{b}.depthwise", out, stride, groups=out.shape[1])))
            out = self.bn(f"{b}.bn3", self.conv(f"{b}.project", out))
            if self.has(f"{b}.shortcut"):
                x = out + self.bn(f"{b}.shortcut.1", self.conv(f"{b}.shortcut.0", x))
            else:
                x = out + x if stride == 1 else out
        return self.head(self.act(self.bn("bn2", self.conv("conv2", x))))


FORMULAS = {
    "resnet18": (Formula.resnet, 2, 4),
    "preactresnet18": (Formula.preact, 2, 4),
    "wrn-34-10": (Formula.preact, 5, 3),
    "mobilenetv2": (Formula.mobilenetv2,),
    "smallresnet": (Formula.resnet, 1, 3),
}


@pytest.mark.parametrize(("activation", "act"), [("relu", F.relu), ("silu", lambda x: x / (1 + (-x).exp()))])
@pytest.mark.parametrize("arch", ARCHS)
def test_forward_equals_the_formula(arch, activation, act):
    torch.manual_seed(0)
    model = build_model(arch, 7, activation=activation)
    for name, t in model.state_dict().items():  # so that every statistic and bias affects the result
        if "running" in name or name.endswith("bias"):
            t.uniform_(0.5, 1.5)
    x = torch.rand(2, 3, 18, 12)  # not square, not a multiple of the strides
    with torch.no_grad():
        logits = model.eval()(x)
        formula, *shape = FORMULAS[arch]
        torch.testing.assert_close(
            logits.double(), formula(Formula(model, act), x.double(), *shape), rtol=1e-4, atol=1e-4
        )
        assert torch.equal(logits, model.fc(model.features(x)))
        assert model.features(x).shape == (2, model.feature_dim)
        assert model.feature_dim == model.fc.in_features


def test_wrn_initialisation():
    torch.manual_seed(0)
    model = build_model("wrn-34-10", 10)
    for name, p in model.named_parameters():
        if p.dim() == 4 and p.numel() > 50_000:  # enough samples for a standard deviation within 2 %
            fan_out = p.shape[0] * p.shape[2] * p.shape[3]
            assert p.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02), name
    assert not model.fc.bias.any()


def test_normalize():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    x = torch.rand(4, 3, 8, 8)
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(Normalize(mean, std)(x), expected)
    assert set(Normalize(mean, std).state_dict()) == {"mean", "std"}  # saved with the weights


def test_no_randomness_in_forward():
    model = build_model("mobilenetv2", 5).train()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), model(x))


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match=r"resnet81.*resnet18, preactresnet18, wrn-34-10, mobilenetv2, smallresnet"):
        build_model("resnet81", 10)


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="unknown activation 'gelu'; choose one of relu, silu"):
        build_model("resnet18", 10, activation="gelu")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_initial_weights_do_not_depend_on_the_activation(arch):
    weights = []
    for activation in ("relu", "silu"):
        torch.manual_seed(0)
        weights.append(build_model(arch, 10, activation=activation).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_smallresnet_learns_the_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32), torch.tensor(digits.target)
    x, y, x_test, y_test = x[:600], y[:600], x[600:], y[600:]
    torch.manual_seed(0)
    model = build_model("smallresnet", 10, in_channels=1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(4):
        for batch in torch.randperm(600).split(60):
            opt.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            opt.step()
    accuracy = (model.eval()(x_test).argmax(1) == y_test).float().mean().item()
    assert accuracy > 0.9
