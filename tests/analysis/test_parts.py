"""Measurements over a test set: batches, means per group, noise and attack."""

import pytest
import torch
import torch.nn.functional as F

from helpers.toy_networks import small_net
from ltat_fast.analysis.alignment import gradient_alignment
from ltat_fast.analysis.linearity import output_distance
from ltat_fast.analysis.parts import Subject, alignment, linearity


def images(n=20):
    return torch.randint(256, (n, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_batches_are_concatenated_in_order():
    pixels = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1)
    labels = torch.arange(10) % 2
    subject = Subject(torch.nn.Identity(), pixels, labels, {"tail": [1], "none": [7]}, [5, 5], 0.1, batch_size=3)
    values = subject.measure(lambda x, y, stream: {"deep": {"er": 255 * x.flatten() + y}})
    torch.testing.assert_close(values["deep"]["er"], torch.arange(10).float() + labels)
    means = subject.averages(values, torch.arange(10) > 5)["deep"]["er"]
    assert means == {"all": pytest.approx(8), "tail": pytest.approx(9), "none": None}


def test_each_batch_has_its_own_reproducible_noise():
    subject = Subject(small_net(), images(8), torch.zeros(8, dtype=torch.int64), {}, [1, 1, 1], 0.1, batch_size=4)
    draws = [[torch.rand(3, generator=stream(name)) for _, _, stream in subject.batches()] for name in ("a", "a", "b")]
    assert torch.equal(torch.stack(draws[0]), torch.stack(draws[1]))
    assert len({tuple(draw.tolist()) for run in draws for draw in run}) == 4


def test_measurements_at_attacked_images():
    """With one batch, so that the attack is the same as on the whole set."""
    student, teacher, labels = small_net(seed=0), small_net(seed=1), torch.arange(20) % 3
    subject = Subject(student, images(), labels, {"tail": [2]}, [9, 5, 2], 0.1, teacher=teacher)
    ((x, y, stream),) = subject.batches()
    x_adv = subject.attack(x, y, stream)
    assert (x_adv - x).abs().max() <= 0.1 + 1e-6
    with torch.no_grad():
        student.eval()
        assert (F.cross_entropy(student(x_adv), y) > F.cross_entropy(student(x), y)).item()
    found, u = alignment(subject), torch.zeros(20, 3)
    for at, point in (("clean", x), ("adv", x_adv)):
        expected = gradient_alignment(student, teacher, point, y, u)
        for kind in ("gd", "gc"):
            for scalar in ("ce", "logit"):
                values = expected[kind][scalar]
                assert found[at][kind][scalar]["all"] == pytest.approx(values.mean().item(), rel=1e-5)
                assert found[at][kind][scalar]["tail"] == pytest.approx(values[y == 2].mean().item(), rel=1e-5)
    assert found["clean"]["gd"]["ce"]["all"] != pytest.approx(found["adv"]["gd"]["ce"]["all"], rel=0.01)

    found = linearity(subject)["distance"]
    expected = output_distance(student, teacher, x_adv)["probabilities"].mean().item()
    assert found["adv"]["probabilities"]["all"] == pytest.approx(expected, rel=1e-5)
    noise = (2 * torch.rand(x.shape, generator=stream("noise")) - 1) * 0.1
    expected = output_distance(student, teacher, x + noise)["logits"].mean().item()
    assert found["uniform"]["logits"]["all"] == pytest.approx(expected, rel=1e-5)
