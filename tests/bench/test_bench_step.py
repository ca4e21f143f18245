"""The reference step is an independent implementation of our step, so each checks the other, lever by lever."""

import csv
import functools
import math

import pytest
import torch

from bench import step as bench_step
from bench.step import NEED_A_COMPILER, Ours, Problem, Reference, count_flops, ladder, main

LEVERS = {
    "none": {"fold_bn": False, "channels_last": False},
    "BN folded": {"channels_last": False},
    "channels_last": {},
}
# Largest difference of a loss within 20 steps, as a share of the first loss. The first steps agree up to rounding.
# Later some gradients are so close to zero that their sign depends on rounding, which moves a pixel by two steps.
FP32, BF16 = 0.01, 0.03


def problem(method, device="cpu"):
    return Problem(torch.device(device), "smallresnet", image_size=8, batch_size=16, method=method, attack_steps=3)


def losses(variant, steps=20):
    return torch.tensor([variant.loss(seed) for seed in range(steps)])


@pytest.fixture(scope="module")
def reference_losses():
    @functools.cache
    def of(method):
        return losses(Reference(problem(method)))

    return of


@pytest.mark.parametrize("method", ["at-bsl", "ltat"])
def test_one_step_equals_the_reference(method):
    reference = Reference(problem(method))
    ours = Ours(problem(method), fold_bn=False, channels_last=False)
    before = [p.detach().clone() for p in reference.model.parameters()]
    assert ours.loss(0) == pytest.approx(reference.loss(0), rel=1e-5)
    moved = 0.0
    for p, q, start in zip(ours.model.parameters(), reference.model.parameters(), before, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
        moved = max(moved, (q - start).abs().max().item())
    for p, q in zip(ours.model.buffers(), reference.model.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert moved > 1e-4  # it did train


@pytest.mark.parametrize("method", ["at-bsl", "ltat"])
@pytest.mark.parametrize("lever", LEVERS)
def test_levers_keep_the_trajectory_in_fp32(method, lever, reference_losses):
    expected = reference_losses(method)
    ours = losses(Ours(problem(method), **LEVERS[lever]))
    assert (ours[:2] - expected[:2]).abs().max() < 1e-4
    assert (ours - expected).abs().max() < FP32 * expected[0]
    assert expected[-1] < 0.5 * expected[0]  # the steps did train


def test_frozen_attack_alone_changes_no_bit(reference_losses):
    assert torch.equal(losses(Reference(problem("ltat"), frozen=True)), reference_losses("ltat"))


@pytest.mark.parametrize("method", ["at-bsl", "ltat"])
def test_bf16_stays_near_the_trajectory(method, reference_losses):
    expected = reference_losses(method)
    ours = losses(Ours(problem(method), dtype=torch.bfloat16))
    assert (ours - expected).abs().max() < BF16 * expected[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("method", "backend"), [("at-bsl", "eager"), ("ltat", "eager"), ("ltat", "graph")])
def test_backends_keep_the_trajectory_on_cuda(method, backend, monkeypatch):
    """Each replay of the captured step uses the weights, the noise seed and the update of the eager step."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    expected = losses(Reference(problem(method, "cuda")))
    ours = losses(Ours(problem(method, "cuda"), backend=backend))
    assert (ours - expected).abs().max() < FP32 * expected[0]


def test_counted_flops_agree_with_the_formula():
    """Up to the classifier and the stem, whose input gradient a student does not need."""
    for method, units in (("at-bsl", 2 * 3 + 3), ("ltat", 2 * 3 + 8)):
        p = problem(method)
        assert p.units == units
        assert count_flops(p) == pytest.approx(p.units * p.forward_flops() * p.batch_size, rel=0.03)


def test_forward_flops_of_resnet18():
    """The sum over the layers is 0.555 G multiply-adds at 32x32."""
    assert Problem(torch.device("cpu")).forward_flops() == pytest.approx(1.11e9, rel=0.01)


@pytest.fixture
def small_matmul(monkeypatch):
    """Measure the ceiling on a small matrix product."""
    monkeypatch.setitem(bench_step.MATMUL_SIZE, "cpu", 64)


@pytest.mark.usefixtures("small_matmul")
def test_main_writes_table_csv_and_plot(tmp_path, monkeypatch, capsys):
    """End to end, without the rows that are compiled for half a minute, and with a row that cannot run."""

    def broken():
        raise RuntimeError("no such lever")

    def short_ladder(p):
        return {name: build for name, build in ladder(p).items() if name not in NEED_A_COMPILER} | {"broken": broken}

    monkeypatch.setattr(bench_step, "ladder", short_ladder)
    out = tmp_path / "step.csv"
    flags = "--device cpu --arch smallresnet --image-size 8 --batch-size 8 --attack-steps 2 --rounds 2"
    main([*flags.split(), "--out", str(out)])
    with out.open(newline="") as file:
        rows = {row["variant"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*short_ladder(problem("ltat"))]
    assert rows["reference"]["speedup"] == "1.00"
    assert rows.pop("broken")["note"] == "RuntimeError: no such lever"
    loss = float(rows["reference"]["loss"])
    for name, row in rows.items():
        assert float(row["loss"]) == pytest.approx(loss, rel=0.02 if name == "+ bf16" else 1e-3), name
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        images_per_s = 8 * 1e3 / float(row["median_ms"])
        assert math.isclose(float(row["images_per_s"]), images_per_s, rel_tol=0.01)
        assert float(row["peak_mb"]) > 0
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "+ channels_last" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_rows_keep_the_trajectory(reference_losses):
    expected = reference_losses("ltat")
    for variant in (Reference(problem("ltat"), compiled=True), Ours(problem("ltat"), backend="step")):
        assert (losses(variant) - expected).abs().max() < FP32 * expected[0]


@pytest.mark.usefixtures("small_matmul")
def test_an_interrupt_while_rows_are_built_times_the_finished_rows(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    def short_ladder(p):
        rows = [name for name in ladder(p) if name not in NEED_A_COMPILER]
        return {name: ladder(p)[name] for name in rows[:2]} | {"slow": interrupted, rows[2]: ladder(p)[rows[2]]}

    monkeypatch.setattr(bench_step, "ladder", short_ladder)
    out = tmp_path / "step.csv"
    flags = "--device cpu --arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1 --rounds 2"
    main([*flags.split(), "--out", str(out)])
    with out.open(newline="") as file:
        notes = [(row["note"], row["median_ms"] != "nan") for row in csv.DictReader(file)]
    assert notes == [("", True), ("", True), ("interrupted", False), ("interrupted", False)]
