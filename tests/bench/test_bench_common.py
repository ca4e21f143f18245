"""Tests of the code that the benchmarks share, and of bench.ops, against known results."""

import subprocess
import time
from pathlib import Path

import pytest
import torch

from bench import common

CPU = torch.device("cpu")


def test_timing_finds_the_slower_call_and_its_length():
    def busy(seconds):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    timings = common.time_interleaved({"1 ms": lambda: busy(1e-3), "4 ms": lambda: busy(4e-3)}, CPU, rounds=7)
    assert timings["1 ms"].median == pytest.approx(1, rel=0.1)
    assert timings["4 ms"].median == pytest.approx(4, rel=0.1)
    assert timings["4 ms"].p20 <= timings["4 ms"].median <= timings["4 ms"].p80


def test_rounds_are_interleaved_and_each_starts_with_another_call(monkeypatch):
    monkeypatch.setattr(common, "CPU_SAMPLE_SECONDS", 0)
    order = []
    common.time_interleaved({name: lambda name=name: order.append(name) for name in "abc"}, CPU, rounds=3)
    assert "".join(order[6:]) == "abcbcacab"  # after two calls each to warm up and to calibrate


def test_percentiles():
    timing = common.Timing.of([float(i) for i in range(11)])
    assert (timing.p20, timing.median, timing.p80) == (2, 5, 8)


def test_peak_memory_counts_what_is_allocated_at_the_same_time():
    x = torch.ones(1 << 18)
    megabyte = x.nbytes / 1e6
    assert common.peak_megabytes(lambda: x + 1, CPU) == pytest.approx(megabyte, rel=0.01)
    assert common.peak_megabytes(lambda: (x + 1) * 2, CPU) == pytest.approx(2 * megabyte, rel=0.01)
    assert common.peak_megabytes(lambda: (x + 1).mul_(2), CPU) == pytest.approx(megabyte, rel=0.01)
    assert common.peak_megabytes(lambda: x.add_(0), CPU) < 0.01 * megabyte


def test_csv_appends_rows_and_refuses_other_columns(tmp_path):
    path = tmp_path / "results" / "t.csv"
    common.append_csv(path, [{"a": 1, "b": 2}])
    common.append_csv(path, [{"a": 3, "b": 4}])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]
    with pytest.raises(ValueError, match="choose another --out"):
        common.append_csv(path, [{"a": 1, "c": 2}])
    assert path.read_text().split() == ["a,b", "1,2", "3,4"]


def test_ops_benchmark_rejects_a_wrong_op(monkeypatch):
    """An op whose values differ from the reference is not timed."""
    from bench import ops

    case = ops.pgd_step_case((2, 3, 4, 4), torch.float32, CPU)
    case.fused = {"ours": lambda *args: case.reference(*args) + 1e-3}
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(AssertionError):
        ops.providers(case)


def test_providers_share_no_leaf_tensors(monkeypatch):
    """A leaf ties a later capture to the stream of an earlier forward, so each provider needs its own leaves."""
    from bench import ops

    case = ops.igdm_loss_case((4, 10), torch.float32, CPU)
    seen = []

    def loss(*inputs):
        seen.append(inputs)
        return case.reference(*inputs)

    one, other = ops.directions(case, loss), ops.directions(case, loss)
    assert not seen, "a function ran before it was called"
    expected = one["both"]()
    torch.testing.assert_close(one["backward"](), expected)
    torch.testing.assert_close(one["backward"](), expected)
    torch.testing.assert_close(other["both"](), expected)
    assert len(seen) == 3, "backward must run its forward only once"
    assert all(ours is not theirs for ours, theirs in zip(seen[0][:2], seen[2][:2], strict=True))


def test_gpu_script_needs_a_folder(tmp_path):
    script = Path(common.__file__).parent / "gpu.sh"
    ran = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert "usage: bench/gpu.sh" in ran.stderr
    assert ran.stdout == ""
    assert [*tmp_path.iterdir()] == []
