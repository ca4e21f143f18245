"""Each process of test_distributed.py runs this: three training steps and an evaluation. The main one saves them."""

import sys
from pathlib import Path

import torch
from torch import nn

from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import METHODS, MethodContext
from ltat_fast.models import build_model
from ltat_fast.models.sync_batch_norm import synchronise_batch_norm
from ltat_fast.training import distributed
from ltat_fast.training.device import Hardware
from ltat_fast.training.evaluation import evaluate
from ltat_fast.training.step import TrainStep, frozen_twin, make_optimizer

BATCH, STEPS = 16, 3


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model("smallresnet", 10, in_channels=1)


def main(out: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.start(use_cuda=False)
    hardware = Hardware(torch.device("cpu"), torch.float32, "")
    model = synchronise_batch_norm(network(0))
    method = METHODS["ltat"](alpha=5.0, ramp="constant")
    method.setup(MethodContext(torch.arange(100, 0, -10), frozen_twin(network(1), hardware)))
    optimizer = make_optimizer(model, 0.05, 0.9, 5e-4)
    # No random start: each process draws its own, which would differ from that of a single process.
    attack = AttackConfig(0.1, 0.025, 3, noise="none")
    step = TrainStep(model, method, optimizer, attack, hardware, train_model=distributed.wrap(model))

    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (STEPS * BATCH, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (STEPS * BATCH,), generator=generator)
    share = BATCH // world.size
    for i in range(STEPS):
        mine = slice(i * BATCH + world.rank * share, i * BATCH + (world.rank + 1) * share)
        step(images[mine].float() / 255, labels[mine], lr=0.05, progress=1.0, seed=i)
    totals = step.totals()
    groups = {"head": [0, 1, 2], "medium": [3, 4, 5, 6, 7, 8], "tail": [9]}
    scores = evaluate(model, images, labels, ["clean", "pgd3"], groups, 10, 0.1, batch_size=10)
    if world.is_main:
        results = {attack: result.to_json() for attack, result in scores.items()}
        torch.save({"model": model.state_dict(), "totals": totals, "scores": results}, out)
    distributed.wait()  # a process that leaves early aborts the others
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
