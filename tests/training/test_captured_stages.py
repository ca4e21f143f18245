"""A method that begins without attack has two captured graphs, and each step replays the one of its epoch."""

import copy
from collections.abc import Callable

import pytest
import torch

from helpers.cuda_graphs import Graph, fake_cuda_graphs
from helpers.three_steps import COUNTS, HARDWARE, batch, toy_classifier
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import Method, MethodContext
from ltat_fast.methods.natural import Natural
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.methods.taet import Taet
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.training import step as steps
from ltat_fast.training.step import NO_LEVERS, TrainStep, make_optimizer


def train_step(method: Method, backend: str) -> TrainStep:
    net = allow_joint_calls(toy_classifier(method))
    method.setup(MethodContext(torch.tensor(COUNTS)))
    optimizer = make_optimizer(net, 0.1, 0.9, 5e-4)
    attack = AttackConfig(0.1, 0.05, 2, method.noise)
    return TrainStep(net, method, optimizer, attack, HARDWARE, backend, levers=NO_LEVERS)


@pytest.fixture
def captured(monkeypatch) -> list[tuple[bool, list[int]]]:
    """Replace captures on a GPU by graphs that run their function again.

    Returns a list with one entry per graph: whether its steps attack, and a list with one entry per replay.
    """
    graphs, attacked = [], []
    run = TrainStep._run

    def recording_run(step: TrainStep, x, y) -> None:
        attacked.append(False)
        run(step, x, y)

    def recording_perturb(step: TrainStep, *arguments):
        attacked[-1] = True
        return perturb(step, *arguments)

    perturb = TrainStep._perturb_each
    monkeypatch.setattr(TrainStep, "_run", recording_run)
    monkeypatch.setattr(TrainStep, "_perturb_each", recording_perturb)

    def capture(work: Callable[[], None], generator, stream, pool) -> Graph:
        assert pool == ((0, 1) if graphs else None), "the graphs share their memory"
        work()
        graph, attacks, replays = Graph(), attacked[-1], []

        def replay() -> None:
            work()
            assert attacked[-1] == attacks
            replays.append(1)

        graph.replay = replay
        graphs.append((attacks, replays))
        return graph

    monkeypatch.setattr(steps, "capture", capture)
    with fake_cuda_graphs(monkeypatch):
        yield graphs


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (Taet(attack_begin=0.5), [(True, 2), (False, 2)]),
        (Taet(attack_begin=0.0), [(True, 4)]),
        (Taet(attack_begin=1.0), [(False, 4)]),
        (PgdAt(), [(True, 4)]),
        (Natural(), [(False, 4)]),
    ],
    ids=["taet in two stages", "taet with attack only", "taet without attack", "pgd-at", "natural"],
)
def test_each_step_replays_the_graph_of_its_epoch_and_trains_like_eager(captured, method, expected):
    eager, graph = train_step(method, "eager"), train_step(copy.deepcopy(method), "graph")
    for epoch in range(1, 5):
        for step in (eager, graph):
            step(*batch(epoch), lr=0.1, progress=epoch / 4, seed=epoch)
    assert [(attacks, len(replays)) for attacks, replays in captured] == expected
    for ours, theirs in zip(graph.model.state_dict().values(), eager.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    assert graph.totals() == eager.totals()
