"""The choice of the backend of a step: one that fails or differs from eager is dropped and changes nothing."""

import copy
import gc
import os
import signal
import weakref

import pytest
import torch

from helpers.cuda_graphs import emulate_failed_capture, fake_cuda_graphs
from helpers.toy_networks import images, labels, small_net
from ltat_fast.attacks import AttackConfig
from ltat_fast.methods import MethodContext
from ltat_fast.methods.pgd_at import PgdAt
from ltat_fast.models.joint_batch import allow_joint_calls
from ltat_fast.signals import Interrupted, stop_at_once
from ltat_fast.training import backend as backends
from ltat_fast.training.backend import GraphNotUsable, choose_backend
from ltat_fast.training.cuda_graph import capture
from ltat_fast.training.device import Hardware
from ltat_fast.training.step import TrainStep, make_optimizer

HARDWARE = Hardware(torch.device("cpu"), torch.float32, "test")


class Setup:
    """A network after one step, so that its momentum is not zero, and the function that builds steps for it."""

    def __init__(self):
        self.net = allow_joint_calls(small_net())
        self.optimizer = make_optimizer(self.net, 0.1, 0.9, 5e-4)
        self.method = PgdAt()
        self.method.setup(MethodContext(torch.ones(3)))
        self.build("eager")(images(seed=9), labels(), lr=0.1, progress=0.5, seed=0)

    def build(self, backend: str, step_class=TrainStep) -> TrainStep:
        return step_class(self.net, self.method, self.optimizer, AttackConfig(0.1, 0.05, 2), HARDWARE, backend)

    def state(self) -> dict:
        momenta = {f"m{i}": s["momentum_buffer"] for i, s in enumerate(self.optimizer.state.values())}
        return copy.deepcopy({**self.net.state_dict(), **momenta})


def assert_same(ours, theirs):
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Eager(TrainStep):
    """A stand-in for a compiled step that does not compile: eager under another name."""

    def __init__(self, *args):
        super().__init__(*args[:5], "eager")
        self.backend = args[5]

    def __call__(self, x, y, **kwargs):
        self._run(x, y)


class FailsAfterTheUpdate(Eager):
    def _record(self, parts):
        raise RuntimeError("no kernel for this\nand a page of details")


class ComputesSomethingElse(Eager):
    def loss(self, x, x_adv, y):
        loss, parts = super().loss(x, x_adv, y)
        return loss * 1.1, parts


class AttacksSomethingElse(Eager):
    def perturb(self, x, y):
        return x


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(backends.log, "say", lines.append)
    return lines


@pytest.fixture
def compiled(monkeypatch):
    """Pretend that torch.compile compiled one more frame before each look at their number."""
    frames = iter(range(1000))
    monkeypatch.setattr(backends, "compiled_graphs", lambda: next(frames))


def choose(setup, step_class, asked="step"):
    def build(backend):
        return setup.build(backend, TrainStep if backend == "eager" else step_class)

    return choose_backend(asked, build, images(), labels())


@pytest.mark.parametrize(
    ("step_class", "why"),
    [
        (FailsAfterTheUpdate, "RuntimeError: no kernel for this"),
        (ComputesSomethingElse, "its loss is"),
        (AttacksSomethingElse, "of its adversarial pixels differ from those of eager|its loss is"),
    ],
)
def test_a_backend_that_fails_or_disagrees_is_dropped_and_changes_nothing(said, compiled, step_class, why):
    setup = Setup()
    before = setup.state()
    step = choose(setup, step_class)
    assert step.backend == "eager"
    assert_same(setup.state(), before)
    *traces, warning, choice = said
    assert warning.startswith("WARNING: backend step is not used: ")
    assert any(part in warning for part in why.split("|"))
    assert "\n" not in warning
    assert choice == "step: backend eager"
    assert all("Traceback" in trace and "and a page of details" in trace for trace in traces)
    assert len(traces) == (step_class is FailsAfterTheUpdate)


def test_a_backend_that_compiles_nothing_is_dropped(said):
    assert choose(Setup(), Eager).backend == "eager"
    assert "torch.compile compiled nothing" in said[0]


def test_a_backend_that_agrees_is_used_and_its_trial_changes_nothing(said, compiled):
    setup, untouched = Setup(), Setup()
    step = choose(setup, Eager)
    assert step.backend == "step"
    assert "agrees with eager" in said[0]
    assert_same(setup.state(), untouched.state())
    assert step.totals()["steps"] == 0


def test_graph_falls_back_to_step_and_then_to_eager(said, compiled):
    tried = []

    class Fails(FailsAfterTheUpdate):
        def __init__(self, *args):
            super().__init__(*args)
            tried.append(self.backend)

    assert choose(Setup(), Fails, "graph").backend == "eager"
    assert tried == ["graph", "step"]


@pytest.mark.parametrize("asked", ["auto", "none"])
def test_auto_and_none_mean_eager_on_a_cpu(said, asked):
    assert choose(Setup(), FailsAfterTheUpdate, asked).backend == "eager"
    assert said == ["step: backend eager"]


def test_the_compiled_step_takes_the_same_step():
    """The real torch.compile on the CPU takes three steps from the same weights as eager."""
    eager, compiled_ = Setup(), Setup()
    step = choose_backend("step", compiled_.build, images(), labels())
    assert step.backend == "step", "torch.compile does not work here"
    reference = eager.build("eager")
    for e in range(3):
        for one in (reference, step):
            one(images(seed=e), labels(seed=e), lr=0.1, progress=0.5, seed=e)
    assert step.totals()["loss"] == pytest.approx(reference.totals()["loss"], rel=1e-3)
    for ours, theirs in zip(compiled_.net.parameters(), eager.net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-2)


def test_a_signal_while_a_backend_is_tried_stops_the_run():
    """The signal does not count as a failure of the backend."""

    class Stopped(Eager):
        def _record(self, parts):
            if self.backend == "step":
                os.kill(os.getpid(), signal.SIGTERM)
            super()._record(parts)

    setup = Setup()
    x, y = images(), labels()
    with stop_at_once(), pytest.raises(Interrupted):
        choose_backend("step", lambda backend: setup.build(backend, Stopped), x, y)


@pytest.mark.parametrize("backend", ["eager", pytest.param("step", marks=pytest.mark.slow)])
def test_a_step_is_freed_without_the_garbage_collector(backend):
    """The garbage collector would free a step in a reference cycle, perhaps while another step is captured."""
    setup = Setup()
    step = setup.build(backend)
    step(images(), labels(), lr=0.1, progress=0.5, seed=0)
    step.trial(images(), labels())
    gone = weakref.ref(step)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()


# -- a failed capture, emulated as torch 2.11 leaves it -----------------------------------------------------------


class CaptureFails(Eager):
    def __call__(self, x, y, **kwargs):
        if self.backend == "graph":
            emulate_failed_capture()
        super().__call__(x, y, **kwargs)


def test_a_failed_capture_names_its_whole_reason_and_asks_for_a_new_process(said, compiled, tmp_path):
    setup = Setup()
    before = setup.state()
    marker = tmp_path / "run" / ".capturing"

    def build(backend):
        return setup.build(backend, TrainStep if backend == "eager" else CaptureFails)

    with pytest.raises(GraphNotUsable, match="could not be captured"):
        choose_backend("graph", build, images(), labels(), marker)
    assert "ValueError: .item() in the captured part" in said[0], "the error that torch hides in __context__"
    assert "operation failed due to a previous error during capture" in said[0]
    assert not marker.exists()
    assert_same(setup.state(), before)


def test_a_failed_capture_is_seen_behind_the_error_that_follows_it(said, compiled):
    """The GPU may refuse the copies that restore the weights."""

    class RestoreFails(CaptureFails):
        def snapshot(self):
            def restore():
                raise RuntimeError("CUDA error: operation not permitted")

            return restore

    setup = Setup()

    def build(backend):
        return setup.build(backend, TrainStep if backend == "eager" else RestoreFails)

    with pytest.raises(GraphNotUsable, match="could not be captured"):
        choose_backend("graph", build, images(), labels())
    assert "operation not permitted" in said[0]


def test_a_run_that_died_in_a_capture_does_not_capture_again(said, compiled, tmp_path):
    marker = tmp_path / ".capturing"
    marker.touch()
    setup = Setup()

    def build(backend):
        return setup.build(backend, TrainStep if backend == "eager" else CaptureFails)

    assert choose_backend("graph", build, images(), labels(), marker).backend == "step"
    assert said[0].startswith("WARNING: backend graph is not used: an earlier process of this run died")
    assert marker.exists()


def test_no_garbage_is_collected_during_a_capture(monkeypatch):
    """An old graph that is destroyed inside a capture makes it fail."""

    class Node:
        pass

    old = Node()
    old.itself = old
    gone = weakref.ref(old)
    del old
    seen = []

    def work():
        seen.extend([gone() is None, gc.isenabled()])

    with fake_cuda_graphs(monkeypatch):
        capture(work, torch.Generator(), torch.cuda.Stream())
    assert seen == [True, False]
    assert gc.isenabled()
