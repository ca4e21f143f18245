"""Choice of the backend of the training step: the fastest one that agrees with eager on a batch of this run.

``torch.compile`` can fail, compile nothing, or compute something else without an error. So a backend and eager first
take one step each from the current state of the run, and the backend is used only if the two steps agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ltat_fast.runs import log
from ltat_fast.training import distributed
from ltat_fast.training.step import TrainStep

# Largest relative difference of the losses, and largest share of adversarial pixels that differ by over eps / 1000. A
# sign attack turns rounding errors into whole steps, in bfloat16 for many pixels, so the share is only a coarse check.
TOLERANCE = {torch.float32: (1e-2, 0.05), torch.bfloat16: (1e-1, 0.6)}


def choose_backend(requested: str, build: Callable[[str], TrainStep], x: Tensor, y: Tensor) -> TrainStep:
    """Return the training step on the ``requested`` backend, or on the next slower one that works.

    requested: "auto", "none", "step" or "graph", the values of ``--compile``. build: backend to a training step over
    the model and the optimizer of the run. x, y: a batch of the run.
    """
    candidates = _candidates(requested, on_gpu=x.is_cuda)
    if candidates:
        reference = build("eager").trial(x, y)
    for backend in candidates:
        step = build(backend)
        graphs_before = compiled_graphs()
        try:
            problem = disagreement(step.trial(x, y), reference, step)
        except Exception as error:  # a compiler or a capture may raise anything; eager always works
            problem = f"{type(error).__name__}: {_first_line(error)}"
        graphs = compiled_graphs() - graphs_before
        if not problem and graphs == 0:
            problem = "torch.compile compiled nothing"
        if not distributed.any_process(bool(problem), x.device):
            log.say(f"step: backend {backend}, checked against eager on one batch; {graphs} compiled graphs")
            if step.method.differentiates_twice:
                log.say("step: the student runs eagerly, because its loss is differentiated twice")
            return step
        log.say(f"WARNING: backend {backend} is not used: {problem or 'it failed in another process'}")
    log.say("step: backend eager")
    return build("eager")


def _candidates(requested: str, on_gpu: bool) -> list[str]:
    """Return the compiled backends to try, the fastest first."""
    if requested == "auto" and on_gpu:
        # A CUDA graph does not capture the collectives of several processes.
        requested = "graph" if distributed.current().size == 1 else "step"
    return {"graph": ["graph", "step"], "step": ["step"], "auto": [], "none": []}[requested]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def disagreement(trial: tuple[Tensor, float], eager_trial: tuple[Tensor, float], step: TrainStep) -> str:
    """Return how two results of :meth:`TrainStep.trial` differ beyond :data:`TOLERANCE`, or "" if they agree."""
    (x_adv, loss), (x_adv_eager, loss_eager) = trial, eager_trial
    loss_tolerance, pixel_tolerance = TOLERANCE[step.dtype]
    if not abs(loss - loss_eager) <= loss_tolerance * abs(loss_eager):
        return f"its loss is {loss:.6g}, the loss of eager is {loss_eager:.6g}"
    moved = ((x_adv - x_adv_eager).abs() > 1e-3 * step.attack.eps).float().mean().item()
    if moved > pixel_tolerance:
        return f"{moved:.0%} of its adversarial pixels differ from eager's"
    return ""


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]
