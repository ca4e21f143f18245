"""Choose precision and number of threads on a CPU by measuring one attack step of the run itself.

The feature flags of a CPU do not tell which precision is faster. On a CPU with AVX512-bf16 but without AMX, a small
network trained at 705 images/s in bf16 and 490 in fp32 on one thread. On two threads, with another process running, it
trained at 269 in bf16 and 626 in fp32.
"""

import os
import time
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from torch import Tensor, nn

from ltat_fast.attacks import AttackConfig, cross_entropy, pgd
from ltat_fast.config import Config
from ltat_fast.models.precision import cpu_has_bf16
from ltat_fast.runs.environment import dtype_name
from ltat_fast.runs.finished import Environment
from ltat_fast.training import distributed
from ltat_fast.training.device import Hardware
from ltat_fast.training.stage import Stage
from ltat_fast.training.step import frozen_twin

ROUNDS = 5
SECONDS = 4.0  # after this time no further round starts
CLEARLY_FASTER = 0.9  # another choice than the default must take at most this share of its time

Choice = tuple[torch.dtype, int]


def choose_for_cpu(stage: Stage, hardware: Hardware) -> Hardware:
    """Return ``hardware`` with the fastest precision on its CPU, and set the fastest number of threads.

    Only what the user left open is measured: the precision if ``--precision`` is auto, the threads if OMP_NUM_THREADS
    is not set. A resumed run keeps its choice, so that it stays bit-equal, whatever OMP_NUM_THREADS is now. On a GPU
    nothing changes, and several processes measure nothing. The measured attack is on the network of ``stage``, on a
    micro-batch of its images.
    """
    config = stage.config
    if hardware.device.type != "cpu":
        return hardware
    default = (hardware.dtype, torch.get_num_threads())
    candidates = _candidates(config, default)
    if len(candidates) == 1:
        (dtype, threads), why = candidates[0], hardware.why
        if candidates[0] != default:
            why = f"{_name(candidates[0])}, as before"
    else:
        x, y = next(stage.loader.batches(0))
        n = len(x) // config.accumulate
        times = _measure(candidates, stage.model, x[:n], y[:n])
        dtype, threads = fastest(times, default if default in candidates else candidates[0])
        told = "; ".join(f"{_name(choice)} {1e3 * seconds:.3g} ms" for choice, seconds in times.items())
        why = f"{_name((dtype, threads))}, measured per attack step: {told}"
    torch.set_num_threads(threads)
    return replace(hardware, dtype=dtype, why=why)


def fastest(times: dict[Choice, float], default: Choice) -> Choice:
    """Return the choice with the smallest time, or ``default`` if no other is clearly faster."""
    best = min(times, key=lambda choice: times[choice])
    return best if times[best] < CLEARLY_FASTER * times[default] else default


def _candidates(config: Config, default: Choice) -> list[Choice]:
    """Return the choices to measure. Those that env.json of a resumed run records are the only ones, if possible."""
    dtypes, threads = [default[0]], [default[1]]
    several = distributed.current().size > 1
    if config.precision == "auto" and cpu_has_bf16() and not several:
        dtypes = [torch.bfloat16, torch.float32]
    if "OMP_NUM_THREADS" not in os.environ and default[1] > 1 and not several:
        threads.append(1)
    if config.resume:
        earlier = Environment.load_or_empty(config.run_dir / "env.json")
        dtypes = [dtype for dtype in dtypes if dtype_name(dtype) == earlier.precision] or dtypes
        if 1 <= (earlier.threads or 0) <= (os.cpu_count() or 1):
            threads = [earlier.threads]
    return list(product(dtypes, threads))


def _measure(candidates: list[Choice], model: nn.Module, x: Tensor, y: Tensor) -> dict[Choice, float]:
    """Seconds of one attack step (forward, input gradient) for each candidate: the median of interleaved rounds."""
    attack = AttackConfig(steps=1, noise="none")
    twins = {dtype: frozen_twin(model, Hardware(x.device, dtype, "")) for dtype in {dtype for dtype, _ in candidates}}
    times: dict[Choice, list[float]] = {choice: [] for choice in candidates}
    threads_before, began = torch.get_num_threads(), time.monotonic()
    for round_ in range(ROUNDS + 1):
        for choice in candidates:
            dtype, threads = choice
            torch.set_num_threads(threads)
            started = time.monotonic()
            pgd(twins[dtype], x, cross_entropy(y), attack)
            times[choice].append(time.monotonic() - started)
        if round_ > 0 and time.monotonic() - began > SECONDS:
            break
    torch.set_num_threads(threads_before)
    return {choice: median(taken[1:]) for choice, taken in times.items()}  # the first round warms up


def _name(choice: Choice) -> str:
    dtype, threads = choice
    return f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} on {threads} thread{'s' if threads > 1 else ''}"
