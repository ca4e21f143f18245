"""The frozen twin compared with the eval mode of the live model, for all architectures and conversions."""

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ltat_fast.models import ARCHS, build_model
from ltat_fast.models.classifier import Normalize
from ltat_fast.models.frozen import FrozenTwin

BF16 = torch.bfloat16
CONVERSIONS = {
    "shared": {"fold_bn": False},
    "unfolded-nhwc": {"fold_bn": False, "channels_last": True},
    "folded": {},
    "folded-nhwc": {"channels_last": True},
    "bf16": {"dtype": BF16},
    "bf16-nhwc": {"dtype": BF16, "channels_last": True},
    "bf16-unfolded": {"fold_bn": False, "dtype": BF16},
}
FOLDED = {"resnet18": 20, "preactresnet18": 8, "wrn-34-10": 16, "mobilenetv2": 57, "smallresnet": 9}


def train(model, x, y, steps=3, lr=0.02):
    """Take a few SGD steps in train mode, so that all weights and batch norm statistics change."""
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        opt.step()


def attack_gradient(f, x, y):
    """Return the logits and the input gradient of an attack step."""
    x = x.detach().requires_grad_()
    logits = f(x)
    return logits.detach(), torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), x)[0]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def cosine(a, b):
    return F.cosine_similarity(a.flatten(1).double(), b.flatten(1).double()).mean().item()


def signs_agree(a, b):
    return (a.sign() == b.sign()).double().mean().item()


@pytest.mark.parametrize("arch", ARCHS)
def test_the_twin_equals_the_live_model_in_eval_mode(arch):
    """The twin is built on initial weights and refreshed after training; the reference is in float64."""
    torch.manual_seed(0)
    n, size = (2, 12) if arch == "wrn-34-10" else (8, 24)
    x, y = torch.rand(n, 3, size, size), torch.arange(n)
    model = build_model(arch, 10)
    fresh = copy.deepcopy(model.state_dict())
    train(model, x, y)
    trained = copy.deepcopy(model.state_dict())
    true_logits, true_grad = attack_gradient(copy.deepcopy(model).double().eval(), x.double(), y)
    with torch.autocast("cpu", BF16):  # the reference for the error in bfloat16
        _, auto_grad = attack_gradient(copy.deepcopy(model).eval(), x, y)

    for name, how in CONVERSIONS.items():
        model.load_state_dict(fresh)
        twin = FrozenTwin(model, **how)
        model.load_state_dict(trained)
        twin.refresh()
        logits, grad = attack_gradient(twin, x, y)
        assert logits.dtype == grad.dtype == torch.float32
        error, angle, signs = relative(logits, true_logits), cosine(grad, true_grad), signs_agree(grad, true_grad)
        print(f"{arch} {name}: logits off by {error:.1e}, gradient cosine {angle:.5f}, signs agree {signs:.2%}")
        if twin.dtype is None:
            assert error < 1e-4
            assert angle > 0.9999
            assert signs > 0.998
        else:
            assert error < 2e-2
            assert 1 - angle < 1.5 * (1 - cosine(auto_grad, true_grad))
            assert 1 - signs < 1.3 * (1 - signs_agree(auto_grad, true_grad))


@pytest.mark.parametrize("arch", ARCHS)
def test_every_batch_norm_after_a_convolution_is_folded(arch):
    with torch.device("meta"):
        model = build_model(arch, 10)
    twin = FrozenTwin(model)
    assert len(twin.folded) == FOLDED[arch]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in twin.modules())
    for conv, bn in twin.folded:
        assert model.get_submodule(conv).out_channels == model.get_submodule(bn).num_features
    assert FrozenTwin(model, fold_bn=False).folded == ()


@pytest.mark.parametrize("how", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_live_model_is_not_changed(how):
    torch.manual_seed(0)
    x, y = torch.rand(8, 3, 12, 12), torch.arange(8)
    model = build_model("preactresnet18", 10)
    train(model, x, y, steps=1)
    model.blocks[1].eval()  # train mode in some modules, eval mode in others
    model.fc.bias.requires_grad_(False)

    def state():
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        grads = {
            name: None if p.grad is None else (id(p.grad), p.grad._version) for name, p in model.named_parameters()
        }
        modes = [m.training for m in model.modules()]
        identity = {name: (id(t), t.data_ptr(), t.stride(), t._version, t.requires_grad) for name, t in tensors.items()}
        return identity, grads, modes, [type(m) for m in model.modules()], list(model.state_dict())

    before, values = state(), copy.deepcopy(model.state_dict())
    twin = FrozenTwin(model, **how)
    for _ in range(2):
        twin.refresh()
        attack_gradient(twin.train(), x, y)
    assert state() == before
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert not any(p.requires_grad for p in twin.parameters())
    assert not any(m.training for m in twin.modules())
    assert not any("live" in name for name in twin.state_dict())


@pytest.mark.parametrize("how", CONVERSIONS.values(), ids=CONVERSIONS)
def test_refresh_follows_every_change(how):
    torch.manual_seed(0)
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    model = build_model("smallresnet", 10, in_channels=1)
    twin = FrozenTwin(model, **how)
    shares = how == CONVERSIONS["shared"]
    addresses = {name: t.data_ptr() for name, t in [*twin.named_parameters(), *twin.named_buffers()]}
    for _ in range(3):
        stale = twin(x)
        train(model, x, y, steps=1, lr=0.1)
        with torch.no_grad():
            model.fc.weight.add_(0.1)  # another change, as in adversarial weight perturbation
        assert torch.equal(twin(x), stale) != shares  # only a converted twin needs refresh()
        twin.refresh()
        assert torch.equal(twin(x), FrozenTwin(copy.deepcopy(model), **how)(x))
    model.load_state_dict(build_model("smallresnet", 10, in_channels=1).state_dict())
    twin.refresh()
    assert torch.equal(twin(x), FrozenTwin(model, **how)(x))
    assert {name: t.data_ptr() for name, t in [*twin.named_parameters(), *twin.named_buffers()]} == addresses


def shared_with(model, twin):
    """Return the number of the twin's tensors that use storage of the model, and the number of its tensors."""
    live = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    shared = [t.data_ptr() in live for t in twin.state_dict().values()]
    return sum(shared), len(shared)


def test_the_twin_shares_all_storage_or_none():
    """If it shared only some, a part of the weights would be newer than the rest until the next refresh."""
    model = build_model("preactresnet18", 10)
    shared, total = shared_with(model, FrozenTwin(model, fold_bn=False))
    assert shared == total
    for name, how in CONVERSIONS.items():
        assert name == "shared" or shared_with(model, FrozenTwin(model, **how))[0] == 0
    model.to(memory_format=torch.channels_last)
    shared, total = shared_with(model, FrozenTwin(model, fold_bn=False, channels_last=True))
    assert shared == total


@pytest.mark.parametrize("how", [{"fold_bn": False}, {}], ids=["shared", "folded"])
@pytest.mark.parametrize("arch", ["resnet18", "preactresnet18"])
def test_an_attack_step_costs_two_forward_passes(arch, how):
    """With parameter gradients it would cost three."""
    model = build_model(arch, 10).train()
    twin = FrozenTwin(model, **how)
    x, y = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    with FlopCounterMode(display=False) as forward:
        twin(x)
    with FlopCounterMode(display=False) as step:
        attack_gradient(lambda x: twin(x.clone()), x, y)  # the hooks of the counter need an input that is not a leaf
    assert step.get_total_flops() == 2 * forward.get_total_flops()


@pytest.mark.parametrize("frozen", [True, False])
def test_compiled_backward_computes_no_weight_gradient(frozen):
    """The compiled live model computes weight gradients that nobody reads; the twin does not."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    masks = []

    def read_masks(graph, example_inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default:
                masks.append(list(node.args[-1]))
        return make_boxed_func(graph.forward)

    model = build_model("smallresnet", 10, in_channels=1).eval()
    f = FrozenTwin(model) if frozen else model
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=read_masks)
    torch._dynamo.reset()
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    _, grad = attack_gradient(torch.compile(f, backend=backend, fullgraph=True), x, y)
    torch.testing.assert_close(grad, attack_gradient(model, x, y)[1], rtol=1e-3, atol=1e-5)
    assert len(masks) == 9
    assert all(mask == [True, not frozen, False] for mask in masks)


@pytest.mark.parametrize("how", CONVERSIONS.values(), ids=CONVERSIONS)
def test_the_twin_is_compiled_once(how):
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    model = build_model("smallresnet", 10, in_channels=1)
    twin = FrozenTwin(model, **how)
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(3):
        train(model, x, y, steps=1)
        model.train(not model.training)  # the mode of the live model does not matter
        twin.refresh()
        logits, grad = attack_gradient(compiled, x, y)
        expected_logits, expected_grad = attack_gradient(twin, x, y)
        torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    assert backend.frame_count == 1


def test_refresh_and_gradient_in_one_compiled_graph():
    torch.manual_seed(0)
    torch._dynamo.reset()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    model = build_model("smallresnet", 10, in_channels=1)
    twin = FrozenTwin(model, dtype=BF16, channels_last=True)

    def step(x, y):
        twin.refresh()
        return torch.func.grad(lambda x: F.cross_entropy(twin(x), y, reduction="sum"))(x)

    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(3):
        train(model, x, y, steps=1)
        grad = compiled(x, y)
        twin.refresh()
        torch.testing.assert_close(grad, attack_gradient(twin, x, y)[1], rtol=0, atol=0)
    assert backend.frame_count == 1


@pytest.mark.parametrize("dtype", [None, BF16])
def test_a_refresh_compiled_by_inductor_writes_the_same_weights(dtype):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = build_model("smallresnet", 10)
    options = {"dtype": dtype, "channels_last": True, "pad_stem": True}
    ours, eager = FrozenTwin(model, **options), FrozenTwin(model, **options)
    addresses = [t.data_ptr() for t in ours.net.state_dict().values()]
    refresh = torch.compile(ours.refresh, dynamic=False, fullgraph=True)
    for _ in range(2):
        train(model, torch.rand(4, 3, 8, 8), torch.arange(4), steps=1)
        refresh()
        eager.refresh()
        for (name, mine), expected in zip(ours.net.state_dict().items(), eager.net.state_dict().values(), strict=True):
            tolerance = 1e-2 if mine.dtype == BF16 else 1e-6
            torch.testing.assert_close(mine, expected, rtol=tolerance, atol=1e-7, msg=name)
    assert [t.data_ptr() for t in ours.net.state_dict().values()] == addresses


# --- networks that do not fold everywhere ----------------------------------------------------------------------------


class Net(nn.Module):
    """A network of the given layers, whose forward is a function of the module and x."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x).mean((2, 3))


def same_conv(**kwargs):
    return nn.Conv2d(3, 3, 3, padding=1, **kwargs)


def tied():
    a, b = same_conv(), same_conv()
    b.weight = a.weight
    return Net(lambda m, x: m.bb(m.b(m.ba(m.a(x)))), a=a, b=b, ba=nn.BatchNorm2d(3), bb=nn.BatchNorm2d(3))


def hooked():
    net = Net(lambda m, x: m.bn(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3))
    net.bn.register_forward_hook(lambda module, args, out: out * 2)
    return net


def branching(m, x):
    return m.bn(m.a(x)) if x.sum() > 0 else x


IRREGULAR = {  # name: (network, pairs that fold)
    "biased convolution": (lambda: Net(lambda m, x: m.bn(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3)), 1),
    "grouped, strided, eps": (
        lambda: Net(
            lambda m, x: m.bn(m.a(x)), a=nn.Conv2d(3, 6, 3, 2, groups=3, bias=False), bn=nn.BatchNorm2d(6, eps=0.3)
        ),
        1,
    ),
    "synchronised batch norm": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(
            Net(lambda m, x: m.bn(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3))
        ),
        1,
    ),
    "keyword call": (lambda: Net(lambda m, x: m.bn(input=m.a(input=x)), a=same_conv(), bn=nn.BatchNorm2d(3)), 1),
    "convolution read twice": (
        lambda: Net(lambda m, x: (lambda c: m.bn(c) + c)(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3)),
        0,
    ),
    "convolution called twice": (lambda: Net(lambda m, x: m.bn(m.a(m.a(x))), a=same_conv(), bn=nn.BatchNorm2d(3)), 0),
    "batch norm called twice": (
        lambda: Net(lambda m, x: m.bn(m.b(m.bn(m.a(x)))), a=same_conv(), b=same_conv(), bn=nn.BatchNorm2d(3)),
        0,
    ),
    "weight read directly": (
        lambda: Net(lambda m, x: m.bn(m.a(x)) * m.a.weight.mean(), a=same_conv(), bn=nn.BatchNorm2d(3)),
        0,
    ),
    "tied convolutions": (tied, 0),
    "hooked": (hooked, 0),
    "parametrised convolution": (
        lambda: Net(
            lambda m, x: m.bn(m.a(x)),
            a=nn.utils.parametrizations.weight_norm(same_conv()),
            bn=nn.BatchNorm2d(3),
        ),
        0,
    ),
    "no affine": (lambda: Net(lambda m, x: m.bn(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3, affine=False)), 0),
    "batch statistics": (
        lambda: Net(lambda m, x: m.bn(m.a(x)), a=same_conv(), bn=nn.BatchNorm2d(3, track_running_stats=False)),
        0,
    ),
    "normalised": (
        lambda: Net(
            lambda m, x: m.bn(m.a(m.n(x))), n=Normalize((0.4,) * 3, (0.2,) * 3), a=same_conv(), bn=nn.BatchNorm2d(3)
        ),
        1,
    ),
    "batch norm first": (lambda: Net(lambda m, x: m.a(m.bn(x)), a=same_conv(), bn=nn.BatchNorm2d(3)), 0),
    "one norm, two names": (
        lambda: (lambda bn: Net(lambda m, x: m.b2(m.a(m.b1(x))), a=same_conv(), b1=bn, b2=bn))(nn.BatchNorm2d(3)),
        0,
    ),
}


@pytest.mark.parametrize("how", [{}, {"channels_last": True}, {"dtype": BF16}], ids=["fp32", "nhwc", "bf16"])
@pytest.mark.parametrize("case", IRREGULAR)
def test_irregular_networks(case, how):
    torch.manual_seed(0)
    build, folds = IRREGULAR[case]
    net = build()
    twin = FrozenTwin(net, **how)
    assert len(twin.folded) == folds
    with torch.no_grad():
        for t in [*net.parameters(), *net.buffers()]:
            if t.is_floating_point():
                t.uniform_(0.5, 1.5)
    twin.refresh()
    x, weight = torch.rand(4, 3, 6, 6).requires_grad_(), torch.rand(4, 1)
    expected = copy.deepcopy(net).double().eval()(x.double())
    assert relative(twin(x), expected) < (1e-5 if twin.dtype is None else 1e-2)
    grads = [torch.autograd.grad((f(x) * weight).sum(), x)[0] for f in (twin, net.eval())]
    assert relative(*grads) < (1e-5 if twin.dtype is None else 2e-2)


def test_a_network_that_cannot_be_traced_warns_and_still_agrees():
    net = Net(branching, a=same_conv(), bn=nn.BatchNorm2d(3))
    with pytest.warns(UserWarning, match="Net cannot be traced"):
        twin = FrozenTwin(net)
    assert twin.folded == ()
    x = torch.rand(4, 3, 6, 6)
    torch.testing.assert_close(twin(x), net.eval()(x))


# --- copying, saving, moving -----------------------------------------------------------------------------------------


def test_a_deepcopy_follows_the_copied_model():
    x = torch.rand(4, 1, 8, 8)
    model = build_model("smallresnet", 10, in_channels=1)
    for how in CONVERSIONS.values():
        holder = {"model": model, "twin": FrozenTwin(model, **how)}
        other = copy.deepcopy(holder)
        with torch.no_grad():
            other["model"].fc.bias.add_(1)
        other["twin"].refresh()
        holder["twin"].refresh()
        torch.testing.assert_close(other["twin"](x) - holder["twin"](x), torch.ones(4, 10), rtol=0, atol=0.02)


def test_a_twin_cannot_be_moved_or_pickled():
    twin = FrozenTwin(build_model("smallresnet", 10))
    with pytest.raises(TypeError, match="save the weights of its live model"):
        pickle.dumps(twin)
    with pytest.raises(RuntimeError, match="then build a new twin"):
        twin.double()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("how", CONVERSIONS.values(), ids=CONVERSIONS)
def test_refresh_and_gradient_replay_in_a_cuda_graph(how):
    torch.manual_seed(0)
    x, y = torch.rand(8, 3, 32, 32, device="cuda"), torch.arange(8, device="cuda")
    model = build_model("preactresnet18", 10).cuda()
    train(model, x, y)
    twin = FrozenTwin(model, **how)

    def step():
        twin.refresh()
        return attack_gradient(twin, x, y)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, grad = step()
    for _ in range(3):
        train(model, x, y, steps=1)
        graph.replay()
        expected_logits, expected_grad = step()
        torch.testing.assert_close(logits, expected_logits, rtol=1e-2, atol=1e-2)
        assert cosine(grad, expected_grad) > 0.999
