"""What a step compiles to. The tests of compiled code need torch built with CUDA, and no GPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import codegen, levers
from bench.codegen import BANDWIDTH, CEILING, CONV_SHARE, GAP, HOST, LAST_LEVER, Work, operator_work, predict
from bench.fake_cuda import built_with_cuda
from bench.step import COMPILED
from ltat_fast.training.speed import FlopCounter

aten = torch.ops.aten
SMALL = "--arch smallresnet --image-size 16 --batch-size 8 --attack-steps 2"
FLOAT = 4  # bytes


def run(out: Path, variant: str) -> dict[str, dict[str, str]]:
    """Rows of ``python -m bench.codegen`` for ``variant`` by part, in a process of its own that sees no GPU."""
    command = [sys.executable, "-m", "bench.codegen", *SMALL.split(), "--rows", variant, "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    root = Path(codegen.__file__).parents[1]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    with out.open(newline="") as file:
        return {row["part"]: row for row in csv.DictReader(file)}


# (Triton launches, convolutions forward and backward, megabytes) of one call, at most.
BOUNDS = {
    "attack step": (17, 9, 9, 1.9),
    "student forward": (42, 9, 0, 1.7),
    "student backward": (36, 0, 9, 3.3),
    "teacher forward": (0, 9, 0, 4.0),
    "everything else": (0, 0, 0, 5.0),
}


@pytest.mark.slow
def test_compiled_code_stays_within_bounds(tmp_path):
    if not built_with_cuda():
        pytest.skip("this torch is a CPU build: Inductor's code for a GPU is NOT checked")
    rows = run(tmp_path / "codegen.csv", COMPILED)
    for part, (launches, forward, backward, megabytes) in BOUNDS.items():
        row = rows[part]
        found = [int(row[key]) for key in ("triton_launches", "conv_forward", "conv_backward")]
        assert all(n <= most for n, most in zip(found, (launches, forward, backward), strict=True)), (part, found)
        assert 0 < float(row["megabytes"]) <= megabytes, part
    assert rows["attack step"]["calls"] == "2"
    assert rows["student forward"]["calls"] == rows["student backward"]["calls"] == "2"
    steps = [(int(row["calls"]), int(row["triton_launches"])) for part, row in rows.items() if part != "whole step"]
    assert int(rows["whole step"]["triton_launches"]) == sum(calls * launches for calls, launches in steps) > 100

    levers = run(tmp_path / "levers.csv", LAST_LEVER)
    assert levers["student forward"]["calls"] == levers["student backward"]["calls"] == "1"
    student = ("student forward", "student backward")
    launches, before = (sum(int(table[part]["triton_launches"]) for part in student) for table in (levers, rows))
    assert launches < 0.8 * 2 * before
    attack, before = (float(table["attack step"]["megabytes"]) for table in (levers, rows))
    assert attack < before


def test_a_cpu_build_is_refused_in_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(codegen, "built_with_cuda", lambda: False)
    assert codegen.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "needs torch built with CUDA" in err


def work_of(operator, *args, **kwargs) -> Work:
    return operator_work(operator, (args, kwargs), operator(*args, **kwargs))


def test_bytes_of_plain_operators():
    a, b = torch.rand(10, 10), torch.rand(10, 10)
    one = 100 * FLOAT
    for expected, work in (
        (3, work_of(aten.add.Tensor, a, b)),
        (3, work_of(aten.add_.Tensor, a, b)),
        (2, work_of(aten.copy_.default, a, b)),
        (1, work_of(aten.fill_.Scalar, a, 1.0)),
        (2, work_of(aten.relu_.default, a)),
        (3, work_of(aten.cat.default, [a[:5], a[5:], b[:5]]) + work_of(aten.view.default, a, [100])),
        (4, work_of(aten._foreach_copy_.default, [a, b], [b, a])),
        (6, work_of(aten._foreach_add_.List, [a, b], [b, a])),
    ):
        assert (work.bytes, work.nodes, work.flops) == (expected * one, 1, 0)
    assert work_of(aten.t.default, a) == work_of(aten.empty.memory_format, [3]) == Work()


def test_flops_are_those_of_the_flop_counter():
    x, weight, bias = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3), torch.rand(4)
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    with FlopCounter() as counter:
        y = aten.convolution.default(x, weight, None, *options)
    plain = work_of(aten.convolution.default, x, weight, None, *options)
    assert (plain.flops, plain.bytes, plain.nodes, plain.conv_forward) == (counter.total, 0, 1, 1)
    assert plain.seconds_at_ceiling == counter.total / CEILING[torch.float32]
    biased = work_of(aten.convolution.default, x, weight, bias, *options)
    assert (biased.flops, biased.bytes, biased.nodes) == (plain.flops, 2 * y.nbytes, 2)
    both = work_of(aten.convolution_backward.default, y, x, weight, [0], *options, [True, True, False])
    assert (both.flops, both.nodes, both.conv_backward) == (2 * plain.flops, 2, 1)
    bf16 = work_of(aten.mm.default, torch.rand(4, 4).bfloat16(), torch.rand(4, 4).bfloat16())
    assert (bf16.flops, bf16.other_operators) == (2 * 4**3, 1)
    assert bf16.seconds_at_ceiling == 2 * 4**3 / CEILING[torch.bfloat16]


def test_prediction_is_the_formula():
    work = Work(nodes=1000, bytes=8_600_000_000, flops=79 * 10**10, seconds_at_ceiling=1e-3) * 2
    captured, launched = predict(work, 32, captured=True), predict(work, 32, captured=False)
    device = 2e-3 / CONV_SHARE[32] + 4e-3 * 4.3e12 / BANDWIDTH + 2000 * GAP
    assert float(captured["predicted_ms"]) == pytest.approx(1e3 * device, abs=0.1)
    assert float(launched["predicted_ms"]) == pytest.approx(1e3 * max(device, 2000 * HOST), abs=0.1)
    assert float(captured["share_of_matmul"]) == pytest.approx(158e10 / CEILING[torch.bfloat16] / device, abs=0.01)


def test_levers_are_set_and_restored(monkeypatch):
    import torch._inductor.config as inductor

    before = inductor.combo_kernels, torch.backends.cudnn.benchmark_limit
    with levers.pulled(["search-all-convolutions"]):
        assert torch.backends.cudnn.benchmark_limit == 0
    assert (inductor.combo_kernels, torch.backends.cudnn.benchmark_limit) == before
    other = levers.Lever("", {"torch._inductor.config.combo_kernels": True, "torch.backends.no_such_setting": 1})
    monkeypatch.setitem(levers.LEVERS, "other", other)
    with pytest.raises(SystemExit, match="no_such_setting"), levers.pulled(["other"]):
        pass
    assert inductor.combo_kernels == before[0]
