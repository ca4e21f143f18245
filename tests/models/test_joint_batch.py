"""Several batches in one call of a network give what separate calls give: logits, gradients, running statistics."""

import copy

import joint_program
import pytest
import torch
from torch import nn

from helpers.launching import in_two_processes
from ltat_fast.models import ARCHS, build_model
from ltat_fast.models.frozen import FrozenTwin
from ltat_fast.models.joint_batch import (
    JointBatchNorm2d,
    JointSyncBatchNorm,
    allow_joint_calls,
    check_joint_calls,
    forward_each,
    joint_calls,
)


def batches(number: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=generator) for _ in range(number)]


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, 10).double().train()


def assert_same_as_separate_calls(joint: nn.Module, separate: nn.Module, points: list[torch.Tensor]) -> None:
    expected = [separate(point) for point in points]
    with joint_calls(True):
        logits = forward_each(joint, *points)
    assert len(logits) == len(points)
    for ours, theirs in zip(logits, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weight = torch.linspace(-1, 1, expected[0].numel(), dtype=torch.float64).view_as(expected[0])
    for outputs in (logits, expected):
        sum((i + 1) * (weight * out).sum() for i, out in enumerate(outputs)).backward()
    for (name, ours), theirs in zip(joint.named_parameters(), separate.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert (ours.grad - theirs.grad).abs().max() <= 1e-12 * max(scale, 1), name
    for name, buffer in separate.named_buffers():
        torch.testing.assert_close(joint.get_buffer(name), buffer, rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize("arch", [name for name in ARCHS if name != "wrn-34-10"])
def test_every_network(arch, one_pass, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: one_pass)
    separate = network(arch)
    assert_same_as_separate_calls(allow_joint_calls(copy.deepcopy(separate)), separate, batches())


def small(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=4)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(5 * 64, 10)).double().train()


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm2d(5, momentum=0.3, eps=1e-2),
        lambda: nn.BatchNorm2d(5, momentum=None),
        lambda: nn.BatchNorm2d(5, affine=False),
        lambda: nn.BatchNorm2d(5, track_running_stats=False),
        lambda: nn.SyncBatchNorm(5),
    ],
)
def test_every_batch_norm(norm, one_pass, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: one_pass)
    separate = small(norm())
    joint = allow_joint_calls(copy.deepcopy(separate))
    assert type(joint[1]) in (JointBatchNorm2d, JointSyncBatchNorm)
    assert_same_as_separate_calls(joint, separate, batches(3))


def test_the_one_pass_form_in_bfloat16_channels_last(monkeypatch):
    """The arithmetic is float32, and layout and dtype of the activations stay."""
    norm = small(nn.BatchNorm2d(5))[1].float()
    joint = allow_joint_calls(nn.Sequential(norm))[0]
    x = torch.rand(8, 5, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    ours = []
    with joint_calls(True):
        ours = torch.cat(forward_each(joint, x[:4], x[4:]))
    assert ours.dtype == torch.bfloat16
    assert ours.is_contiguous(memory_format=torch.channels_last)
    theirs = torch.cat([nn.functional.batch_norm(half.float(), None, None, training=True) for half in x.chunk(2)])
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("joint") / "outcomes.pt"
    done = in_two_processes(joint_program.__file__, str(out))
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("calls", ["joint", "separate"])
def test_two_processes_with_synchronised_batch_norm(two_processes, calls):
    """In float64, gradients and running statistics are those of one process that calls the network separately."""
    one = joint_program.outcome(joint=False)
    assert two_processes[calls].keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two_processes[calls][name], expected, rtol=1e-10, atol=1e-12, msg=name)


def test_names_parameters_and_eval_mode_stay():
    model = network("smallresnet")
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    x, expected = batches()[0], model.eval()(batches()[0])
    joint = allow_joint_calls(model)
    assert {name: tensor.data_ptr() for name, tensor in joint.state_dict().items()} == before
    torch.testing.assert_close(joint(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(FrozenTwin(joint, fold_bn=True)(x), expected, rtol=1e-9, atol=1e-9)
    assert len(FrozenTwin(joint, fold_bn=True).folded) == len(FrozenTwin(network("smallresnet"), fold_bn=True).folded)


def test_without_permission_every_batch_has_a_call_of_its_own():
    calls = []
    forward_each(lambda x: calls.append(len(x)) or x, *batches())
    assert calls == [4, 4]
    with joint_calls(True):
        forward_each(lambda x: calls.append(len(x)) or x, *batches())
    assert calls == [4, 4, 8]


def test_a_plain_batch_norm_is_refused():
    with pytest.raises(ValueError, match="1 would mix the batches"):
        check_joint_calls(small(nn.BatchNorm2d(5)))
    check_joint_calls(allow_joint_calls(small(nn.BatchNorm2d(5))))
    with pytest.raises(ValueError, match="alone"):
        allow_joint_calls(nn.BatchNorm2d(3))
