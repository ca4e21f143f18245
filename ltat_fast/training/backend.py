"""Choose the backend of the training step: the fastest one that agrees with eager on one batch of this run.

``torch.compile`` can fail. Worse, it can compile nothing, or compute something else, without a message. So every
backend first takes one step from the current state of the run; eager takes the same step; the two must agree.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ltat_fast.files import make_folder, oserror_as_user_error
from ltat_fast.out_of_memory import exhausted
from ltat_fast.runs import log
from ltat_fast.training import distributed
from ltat_fast.training.cuda_graph import CaptureError
from ltat_fast.training.step import TrainStep

# Two results count as equal up to this relative difference of the loss and this share of pixels that differ by more
# than a thousandth of eps. A sign attack turns a rounding error into a whole step, so the second check is coarse:
# many pixels differ in bfloat16, and also between two TF32 convolution algorithms.
TOLERANCE = {"fp32": (1e-2, 0.05), "tf32": (3e-2, 0.25), "bf16": (1e-1, 0.6)}


class GraphNotUsable(Exception):
    """The CUDA graph could not be captured, and the process must not use the GPU again: start a new one without it."""


def choose_backend(
    wanted: str, build: Callable[[str], TrainStep], x: Tensor, y: Tensor, capture_marker: Path | None = None
) -> TrainStep:
    """Return the training step on the backend ``wanted``, or on the next slower backend that works.

    wanted: a value of ``--compile``: "auto", "none", "step" or "graph". build: returns a step on a backend, over the
    model and the optimizer of the run. x, y: a batch of the run. capture_marker: file that exists during a capture, so
    that a run whose process dies in it does not try the same capture again.
    Raises GraphNotUsable if a capture failed.
    """
    reference = None
    for backend in _candidates(wanted, x, capture_marker):
        if reference is None:
            reference = build("eager").trial(x, y)
        step = build(backend)
        before = compiled_graphs()
        problem = _problem(step, x, y, reference, capture_marker if backend == "graph" else None)
        graphs = compiled_graphs() - before
        if not problem and graphs == 0:
            problem = "torch.compile compiled nothing"
        if not distributed.any_process(bool(problem), x.device):
            note = ", not the student: its loss needs a double backward" if step.method.needs_double_backward else ""
            log.say(f"step: backend {backend}, agrees with eager on one batch; {graphs} compiled graphs{note}")
            return step
        log.say(f"WARNING: backend {backend} is not used: {problem or 'it fails in another process'}")
    log.say("step: backend eager")
    return build("eager")


def _candidates(wanted: str, x: Tensor, capture_marker: Path | None) -> list[str]:
    """The backends to try before eager, the fastest first."""
    if wanted == "auto":
        # The collectives of several processes are not captured.
        fastest_on_gpu = "graph" if distributed.current().size == 1 else "step"
        wanted = fastest_on_gpu if x.is_cuda else "none"
    candidates = {"graph": ["graph", "step"], "step": ["step"], "none": []}[wanted]
    if "graph" in candidates and capture_marker is not None and capture_marker.exists():
        log.say(
            "WARNING: backend graph is not used: an earlier process of this run died while it captured the CUDA graph; "
            f"delete {capture_marker} to try again"
        )
        candidates.remove("graph")
    return candidates


def _problem(
    step: TrainStep, x: Tensor, y: Tensor, reference: tuple[Tensor, float], capture_marker: Path | None
) -> str:
    """Try one step. Return why its backend cannot be used, or an empty string. Print the traceback of an error,
    but not if memory ran out: the next backend may need less."""
    try:
        with _marked(capture_marker):
            return disagreement(step.trial(x, y), reference, step)
    except Exception as error:  # a compiler can raise anything; eager always works
        out_of_memory = exhausted(error)
        if out_of_memory and distributed.current().size > 1:
            raise  # the other processes wait for this one in a collective of the step
        if not out_of_memory:
            log.say("".join(traceback.format_exception(error)))
        if failed := _failed_capture(error):
            raise GraphNotUsable(out_of_memory or str(failed)) from error
        if out_of_memory:
            return out_of_memory
        message = str(error).strip().splitlines()
        return f"{type(error).__name__}: {message[0] if message else 'no message'}"


def _failed_capture(error: BaseException | None) -> CaptureError | None:
    """Return the CaptureError in the chain of ``error``: after a capture failed, restoring the weights may fail too."""
    while error is not None and not isinstance(error, CaptureError):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def _marked(marker: Path | None) -> Iterator[None]:
    """Keep the file ``marker`` on the disk inside a ``with`` block. It remains if the process is killed."""
    if marker is None:
        yield
        return
    make_folder(marker.parent)
    with oserror_as_user_error(marker):
        marker.touch()
    try:
        yield
    finally:
        marker.unlink(missing_ok=True)


def disagreement(ours: tuple[Tensor, float], eager: tuple[Tensor, float], step: TrainStep) -> str:
    """Return how two trials differ by more than rounding, or an empty string."""
    (x_adv, loss), (x_adv_eager, loss_eager) = ours, eager
    loss_tolerance, pixel_tolerance = TOLERANCE[_arithmetic(step)]
    if not abs(loss - loss_eager) <= loss_tolerance * abs(loss_eager):
        return f"its loss is {loss:.6g}, the loss of eager is {loss_eager:.6g}"
    moved = ((x_adv - x_adv_eager).abs() > 1e-3 * step.attack.eps).float().mean().item()
    if moved > pixel_tolerance:
        return f"{moved:.0%} of its adversarial pixels differ from those of eager"
    return ""


def _arithmetic(step: TrainStep) -> str:
    if step.dtype != torch.float32:
        return "bf16"
    return "tf32" if step.device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "fp32"


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]
