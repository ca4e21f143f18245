"""The program of each process of test_joint_batch.py: a backward pass through joint or separate calls of a network."""

import sys
from pathlib import Path

import torch

from ltat_fast.models import build_model
from ltat_fast.models.joint_batch import allow_joint_calls, forward_each, joint_calls
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.training import distributed

IMAGES = 8


def outcome(joint: bool) -> dict[str, torch.Tensor]:
    """Return gradients and running statistics, in float64, after one backward pass over the images of all processes.

    The loss is not linear in the logits, and differs between the two batches.
    """
    world = distributed.current()
    torch.manual_seed(0)
    model = allow_joint_calls(synchronise_batch_norm(build_model("smallresnet", 10).double().train()))
    share = slice(world.rank, None, world.size)
    plus, minus = torch.rand(2, IMAGES, 3, 16, 16, dtype=torch.float64)
    # Without DistributedDataParallel: its gradients are averaged below, as it averages them.
    with joint_calls(joint):
        logits = forward_each(model, plus[share], minus[share])
    (logits[0].square().mean() + 2 * logits[1].logsumexp(-1).mean()).backward()
    grads = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
    for grad in grads.values():
        distributed.mean_over_processes(grad)
    return grads | dict(model.named_buffers())


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start(use_cuda=False)
    outcomes = {"joint": outcome(True), "separate": outcome(False)}
    if distributed.current().is_main:
        torch.save(outcomes, Path(sys.argv[1]))
    distributed.wait()  # a process that ends early would abort the others
    distributed.stop()
