"""Capture a function as a CUDA graph, and report a failed capture."""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch


class CaptureError(RuntimeError):
    """A capture failed. The original error is in ``__cause__`` and its ``__context__``.

    The process should not use the GPU again: torch 2.11 leaves its allocator and its default generator in capture
    mode if the end of a capture raises (pytorch#180395 fixes a part of it in 2.12).
    """


def capture(
    work: Callable[[], None],
    generator: torch.Generator,
    stream: torch.cuda.Stream,
    pool: tuple[int, int] | None = None,
) -> torch.cuda.CUDAGraph:
    """Return a graph that repeats ``work()`` when it is replayed.

    work: must have run before, so that nothing is compiled or allocated for the first time. generator: the random
    generator that ``work`` draws from; a replay continues its stream. stream: side stream to capture on.
    pool: memory of an earlier graph to use again, from its ``pool()``; new memory if None.
    Raises CaptureError.
    """
    before = torch.cuda.current_stream()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with _no_garbage_collection():
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                work()
        except Exception as error:
            torch.cuda.set_stream(before)  # torch.cuda.graph restores the stream only after a successful capture
            raise CaptureError("the CUDA graph of the training step could not be captured") from error
    return graph


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect garbage before a ``with`` block and not in it.

    A graph that is destroyed during a capture breaks the capture (pytorch#161037).
    """
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
