"""Which backend the training step runs on: the fastest that gives the eager answer on one batch of this very run.

``torch.compile`` can fail, and worse, it can run nothing compiled or compute something else without a word. So a
backend is not trusted: it takes one step from the state the run is in, eager takes the same, and they must agree.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ltat_fast.runs import log
from ltat_fast.training import distributed
from ltat_fast.training.step import TrainStep

# Relative difference of the loss, and share of pixels moved by more than a thousandth of eps, that still count as the
# same. A sign attack turns rounding into whole steps, in bfloat16 for many pixels, so the second is a coarse check.
TOLERANCE = {torch.float32: (1e-2, 0.05), torch.bfloat16: (1e-1, 0.6)}


def choose_backend(asked: str, build: Callable[[str], TrainStep], x: Tensor, y: Tensor) -> TrainStep:
    """The training step on the backend ``asked`` ("auto", "none", "step", "graph"), or the next slower that works.

    build: makes a step for a backend over the run's model and optimizer. x, y: a batch of the run.
    """
    # Collectives of several processes are left out of a capture.
    fastest = ("graph" if distributed.current().size == 1 else "step") if x.is_cuda else "eager"
    wanted = {"auto": fastest, "none": "eager"}.get(asked, asked)
    ladder = {"graph": ["graph", "step"], "step": ["step"], "eager": []}[wanted]
    reference = None
    for backend in ladder:
        if reference is None:
            reference = build("eager").trial(x, y)
        step = build(backend)
        before = compiled_graphs()
        try:
            problem = disagreement(step.trial(x, y), reference, step)
        except Exception as error:  # whatever a compiler or a capture may raise: eager is always there
            problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        graphs = compiled_graphs() - before
        if not problem and graphs == 0:
            problem = "torch.compile compiled nothing"
        if not distributed.any_process(bool(problem), x.device):
            twice = "; not the student, whose loss is differentiated twice" if step.method.needs_double_backward else ""
            log.say(f"step: backend {backend}, checked against eager on one batch; {graphs} compiled graphs{twice}")
            return step
        log.say(f"WARNING: backend {backend} is not used: {problem or 'it fails in another process'}")
    log.say("step: backend eager")
    return build("eager")


def disagreement(ours: tuple[Tensor, float], eager: tuple[Tensor, float], step: TrainStep) -> str:
    """Why two trials are not the same computation; empty if they are."""
    (x_adv, loss), (x_adv_eager, loss_eager) = ours, eager
    loss_tolerance, pixel_tolerance = TOLERANCE[step.dtype]
    if not abs(loss - loss_eager) <= loss_tolerance * abs(loss_eager):
        return f"its loss is {loss:.6g}, eager's {loss_eager:.6g}"
    moved = ((x_adv - x_adv_eager).abs() > 1e-3 * step.attack.eps).float().mean().item()
    if moved > pixel_tolerance:
        return f"{moved:.0%} of its adversarial pixels differ from eager's"
    return ""


def compiled_graphs() -> int:
    """How many graphs torch.compile has compiled in this process."""
    return counters["stats"]["unique_graphs"]
