"""The program of each process of test_two_processes.py: steps of AWP, REAT and TAET on its share of a batch."""

import sys
from pathlib import Path

import torch

from helpers.three_steps import COUNTS, HARDWARE, batch, toy_classifier
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.training import distributed
from ltat_fast.training.step import TrainStep, make_optimizer

# No tail term of REAT: it forms its pairs within a process.
OPTIONS = {"awp": {"awp_gamma": 0.3}, "reat": {"tail_weight": 0.0}, "taet": {}}


def outcome(name: str) -> dict[str, torch.Tensor]:
    """Return weights, buffers and the state of the method after two steps, over all processes."""
    world = distributed.current()
    method = METHODS[name](**OPTIONS[name])
    model = synchronise_batch_norm(toy_classifier(method).float())
    method.setup(MethodContext(torch.tensor(COUNTS)))
    # No random start: each process would draw other noise.
    attack = AttackConfig(0.1, 0.05, 2, noise="none")
    optimizer = make_optimizer(model, 0.1, 0.9, 5e-4)
    step = TrainStep(model, method, optimizer, attack, HARDWARE, train_model=distributed.wrap(model))
    for seed in range(2):
        x, y = batch(seed)
        share = slice(world.rank, None, world.size)
        step(x[share].float(), y[share], lr=0.1, progress=1.0, seed=seed)
    return model.state_dict() | method.state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start(use_cuda=False)
    outcomes = {name: outcome(name) for name in OPTIONS}
    if distributed.current().is_main:
        torch.save(outcomes, Path(sys.argv[1]))
    distributed.wait()  # a process that ends early would abort the others
    distributed.stop()
