"""A replayed step names the first place in which a number is not finite."""

import pytest
import torch

from helpers.toy_networks import small_net
from helpers.toy_stage import HARDWARE, Method, Poisoned, finite_with_infinite_gradient, not_a_number, stage
from ltat_fast import replay as command
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.training import replay
from ltat_fast.training.fit import train_step
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

NAN = float("nan")


def step_of(method, **modified) -> TrainStep:
    of = stage(None, method, modified=modified)
    return train_step(of, make_optimizer(of.model, 0.1, 0.9, 5e-4), HARDWARE)


def examine(step: TrainStep, x=None) -> list[str]:
    images, y = next(stage(None).loader.batches(0))
    return replay.examine(step, images if x is None else x, y, stage(None).step_arguments(0, 0))


def test_replaying_a_healthy_step_finds_nothing_and_equals_the_training_step():
    watched, plain = step_of(Method()), step_of(Method())
    assert examine(watched) == []
    x, y = next(stage(None).loader.batches(0))
    plain(x, y, **stage(None).step_arguments(0, 0))
    ours, theirs = watched.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "objective" not in vars(watched.method)
    assert not any(module._forward_hooks for module in watched.model.modules())


def test_images_that_are_not_finite_are_found():
    x, _ = next(stage(None).loader.batches(0))
    x[3, 0, 2, 2] = NAN
    assert examine(step_of(Method()), x)[0] == f"the images (1 of {x.numel()} values)"


def test_weights_that_are_not_finite_are_found():
    step = step_of(Method())
    step.model[3].weight.data[0, 0, 0, 0] = NAN
    assert examine(step)[0] == "model.3.weight, before the step (1 of 432 values)"


def test_a_layer_of_the_student_that_overflows_is_found():
    """The weights are finite. The attack overflows first, in the frozen twin of the student."""
    step = step_of(Method())
    step.model[6].weight.data.fill_(3e38)
    findings = examine(step)
    assert findings[0].startswith("attack: network: output of net.6 (")
    assert any(finding.startswith("student: output of 6 (") for finding in findings)


def test_an_objective_of_the_attack_with_an_infinite_gradient_is_found():
    class Method_(Method):
        def objective(self, x_adv, logits, target):
            return super().objective(x_adv, logits, target) + (logits.sum() * 0).sqrt()

    assert examine(step_of(Method_()))[0].startswith("attack: gradient of the images (")


def test_a_teacher_that_is_not_finite_is_found():
    teacher = small_net(seed=7)
    teacher[6].bias.data[1] = float("inf")
    method = METHODS["ltat"]()
    method.setup(MethodContext(torch.ones(3, dtype=torch.int64), frozen_twin(teacher, HARDWARE)))
    assert examine(step_of(method))[0].startswith("teacher: output of net.6 (")


def test_a_part_of_the_loss_that_is_not_finite_is_found():
    class Parted(Method):
        def loss(self, *args):
            loss, parts = super().loss(*args)
            return loss + NAN, parts | {"regulariser": torch.tensor(NAN)}

    assert examine(step_of(Parted()))[:2] == ["loss: part regulariser (1 of 1 values)", "loss (1 of 1 values)"]


@pytest.mark.parametrize(
    ("replacement", "first"),
    [
        (not_a_number, "loss (1 of 1 values)"),
        (finite_with_infinite_gradient, "gradient of 6.weight (216 of 216 values)"),
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_is_found(replacement, first):
    findings = examine(step_of(Poisoned(replacement, (0, 0))))
    assert findings[0].startswith(first)
    assert "6.weight, after the step (216 of 216 values)" in findings


def test_the_inner_step_of_awp_is_replayed():
    """AWP computes a gradient of the weights before the training gradient."""
    assert examine(step_of(Method(), awp=3e38))[0].startswith("student: output of ")


def test_a_checkpoint_is_refused_as_a_dump(tmp_path, digits_run, capsys):
    weights = digits_run / "checkpoints" / "last.safetensors"
    with pytest.raises(SystemExit, match="2"):
        command.main([str(weights)])
    assert "is not a dump of a training step" in capsys.readouterr().err
