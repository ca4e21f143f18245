"""The program of each process of test_two_processes.py: steps on its share of a batch."""

import sys
from pathlib import Path

import torch

from helpers.three_steps import COUNTS, HARDWARE, batch, toy_classifier
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import MethodContext, modifiers
from ltat_fast.methods.at_bsl import AtBsl
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.reat import Reat
from ltat_fast.methods.taet import Taet
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.training import distributed
from ltat_fast.training.step import TrainStep, make_optimizer, trained_state

# Method, modifiers and micro-batches. No tail term of REAT: it forms its pairs within a process.
CASES = {
    "awp": (PgdAt, {"awp": 0.3}),
    "reat": (lambda: Reat(tail_weight=0.0), {}),
    "taet": (Taet, {}),
    "modifiers": (AtBsl, {"awp": 0.3, "ema": 0.7, "eps_balance": 0.4}),
    "micro-batches": (AtBsl, {"awp": 0.3, "ema": 0.7, "accumulate": 2}),
    "taet in micro-batches": (Taet, {"accumulate": 2}),
}


def outcome(name: str) -> dict[str, torch.Tensor]:
    """Return weights, buffers and the state of the method after two steps, over all processes."""
    world = distributed.current()
    make, settings = CASES[name]
    method = make()
    model = toy_classifier(method).float()
    accumulate = settings.get("accumulate", 1)
    settings = {name: value for name, value in settings.items() if name != "accumulate"}
    own = modifiers.build(method, model, torch.tensor(COUNTS), **settings)
    model = synchronise_batch_norm(model)
    method.setup(MethodContext(torch.tensor(COUNTS)))
    # No random start: each process would draw other noise.
    attack = AttackConfig(0.1, 0.05, 2, noise="none")
    optimizer = make_optimizer(model, 0.1, 0.9, 5e-4)
    train_model = distributed.wrap(model)
    step = TrainStep(
        model, method, optimizer, attack, HARDWARE, train_model=train_model, modifiers=own, accumulate=accumulate
    )
    for seed in range(2):
        x, y = batch(seed)
        share = slice(world.rank, None, world.size)
        step(x[share].float(), y[share], lr=0.1, progress=1.0, seed=seed)
    return model.state_dict() | trained_state(method, own)


if __name__ == "__main__":
    torch.set_num_threads(1)
    distributed.start(use_cuda=False)
    outcomes = {name: outcome(name) for name in CASES}
    if distributed.current().is_main:
        torch.save(outcomes, Path(sys.argv[1]))
    distributed.wait()  # a process that ends early would abort the others
    distributed.stop()
