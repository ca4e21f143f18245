"""Memory that runs out, on the host for real and on a device as torch reports it, ends in one sentence."""

import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import train_runs
from ltat_fast.out_of_memory import OutOfMemory, exhausted, explained

LIMITED = str(Path(__file__).parent / "helpers" / "limited_train.py")
GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.06 GiB is free."
)
SHORT = ("--method", "pgd-at", "--epochs", "1", "--max-steps", "2", "--attack-steps", "1", "--batch-size", "16")
SHORT += ("--eval-attacks", "clean,pgd2", "--eval-batch-size", "600")


def error_of(work) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


def wrapped_by_a_compiler() -> None:
    try:
        raise GPU
    except RuntimeError as error:
        raise ValueError("the backend compiler failed") from error


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (error_of(lambda: torch.empty(2**47)), "the host ran out of memory (it had no room for 536870912.00 MiB more)"),
        (error_of(lambda: np.empty(2**55, dtype=np.uint8)), "the host ran out of memory"),
        (MemoryError(), "the host ran out of memory"),
        (
            RuntimeError("could not create a primitive"),
            "the host ran out of memory, it seems (oneDNN: could not create a primitive)",
        ),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the host ran out of memory"),
        (GPU, "the GPU ran out of memory (it had no room for 2.50 GiB more)"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU ran out of memory",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "the GPU ran out of memory"),
        (error_of(wrapped_by_a_compiler), "the GPU ran out of memory (it had no room for 2.50 GiB more)"),
    ],
    ids=str,
)
def test_errors_of_memory_are_recognised(error, what):
    assert exhausted(error) == what
    with pytest.raises(OutOfMemory, match=r"^the (host|GPU) ran out of memory.*: buy some$"), explained("buy some"):
        raise error


def test_other_errors_are_not():
    for error in (RuntimeError("CUDA error: an illegal memory access"), ValueError("DefaultCPUAllocator"), OSError(2)):
        assert exhausted(error) is None
        with pytest.raises(type(error)) as caught, explained("buy some"):
            raise error
        assert caught.value is error


def limited(at: str, mib: int, *flags: str) -> str:
    """Train with little memory. Return what it writes to stderr; it must exit with status 2."""
    environment = os.environ | {"LIMIT_AT": at, "LIMIT_MIB": str(mib), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, LIMITED, *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=train_runs.SAFETY_NET, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


def test_a_host_without_memory_for_a_step_ends_the_run_with_one_sentence(tmp_path):
    out = tmp_path / "run"
    (line,) = limited("step", 20, "--out", str(out), *SHORT, "--arch", "resnet18").strip().splitlines()
    assert line.startswith("ltat_fast: error: the host ran out of memory")
    assert "use a smaller --batch-size (it is 16), or --accumulate 2, which computes each batch in 2 parts" in line
    assert line.endswith(f"; nothing is trained yet: delete {out}, or choose another --out")


def test_a_host_without_memory_for_the_evaluation_keeps_the_run(tmp_path):
    out = tmp_path / "run"
    (line,) = limited("evaluation", 5, "--out", str(out), *SHORT).strip().splitlines()
    assert "evaluate fewer than 600 images at a time (--eval-batch-size of train, --batch-size of evaluate)" in line
    command = f"python -m ltat_fast.train --out {out} --resume --eval-batch-size 300"
    assert line.endswith(f"; resume with: {command}")
    assert train_runs.train(*command.split()[3:]) == 0
    assert (out / "eval.json").exists()


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_gpu_without_memory_in_the_middle_of_a_run_keeps_its_state(stage, tmp_path, monkeypatch, capsys):
    from ltat_fast.methods.ltat import Ltat
    from ltat_fast.methods.pgd_at import PgdAt

    method, calls = {"teacher": PgdAt, "student": Ltat}[stage], []
    loss = method.loss

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise GPU
        return loss(*args)

    out = tmp_path / "run"
    flags = ("--out", str(out), "--epochs", "1", "--teacher-epochs", "1", "--max-steps", "6", "--attack-steps", "1")
    flags += ("--batch-size", "60", "--accumulate", "2", "--eval-attacks", "clean", "--limit-eval", "50")
    with monkeypatch.context() as patched:
        patched.setattr(method, "loss", failing)
        assert train_runs.train(*flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    flag = {"teacher": "--teacher-batch-size (it is 32)", "student": "--batch-size (it is 60)"}[stage]
    assert "the GPU ran out of memory (it had no room for 2.50 GiB more): use a smaller " + flag in line
    assert "or --accumulate 4, which computes each batch in 4 parts" in line
    command = f"python -m ltat_fast.train --out {out} --resume"
    assert line.endswith(f"the saved state is kept, and with more free memory it resumes with: {command}")
    assert train_runs.train(*command.split()[3:]) == 0


@pytest.mark.parametrize(
    ("command", "place", "advice"),
    [
        ("evaluate", "load_splits", "evaluate on a device with more free memory"),
        ("analyse", "runner.analyse", "use a smaller --batch-size (it is 256); finished parts are kept"),
        ("export", "export", "export on a machine with more free memory"),
        ("replay", "replay", "replay on a device with more free memory, for example with --device cpu"),
    ],
)
def test_the_other_commands_say_what_to_change(command, place, advice, digits_run, monkeypatch, capsys):
    def failing(*args):
        raise GPU

    module = import_module(f"ltat_fast.{command}")
    *owner, name = place.split(".")
    monkeypatch.setattr(getattr(module, owner[0]) if owner else module, name, failing)
    assert train_runs.status_of(command, str(digits_run), *(["--again"] if command == "evaluate" else [])) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"ltat_fast: error: the GPU ran out of memory (it had no room for 2.50 GiB more): {advice}")


def test_a_compiled_backend_without_memory_gives_way_to_the_next(monkeypatch):
    from ltat_fast.training import backend
    from ltat_fast.training.step import TrainStep
    from training.test_backend import Setup, images, labels

    class Large(TrainStep):
        def __call__(self, *args, **kwargs):
            if self.backend == "step":
                torch.empty(2**47)
            super().__call__(*args, **kwargs)

    said, setup = [], Setup()
    monkeypatch.setattr(backend.log, "say", said.append)
    step = backend.choose_backend("step", lambda name: setup.build(name, Large), images(), labels())
    assert step.backend == "eager"
    assert said[0].startswith("WARNING: backend step is not used: the host ran out of memory")
    assert len(said) == 2, "no traceback"
