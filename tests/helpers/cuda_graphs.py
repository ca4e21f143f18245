"""CUDA graphs without a GPU: what torch.cuda offers to a capture, and how torch 2.11 behaves when a capture fails."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from ltat_fast.training.cuda_graph import capture


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    def register_generator_state(self, generator: torch.Generator) -> None:
        pass

    def pool(self) -> tuple[int, int]:
        return 0, 1


@contextlib.contextmanager
def fake_cuda_graphs(patch: pytest.MonkeyPatch, end_fails: bool = False) -> Iterator[list[Stream]]:
    """Replace the functions of torch.cuda that a capture uses. Yield a list whose last entry is the current stream.

    end_fails: the end of a capture raises before the stream of the caller is current again, as in torch 2.11.
    """
    streams = [Stream()]

    @contextlib.contextmanager
    def graph(_: Graph, pool: tuple[int, int] | None, stream: Stream) -> Iterator[None]:
        streams.append(stream)
        try:
            yield
        finally:
            if end_fails:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            streams.pop()

    with patch.context() as patched:
        for name, replacement in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "current_stream": lambda: streams[-1],
            "set_stream": streams.append,
        }.items():
            patched.setattr(torch.cuda, name, replacement)
        yield streams


def emulate_failed_capture() -> None:
    """Capture a function that raises; the end of the capture then hides its error. Raise CaptureError."""

    def work() -> None:
        raise ValueError(".item() in the captured part")

    with fake_cuda_graphs(pytest.MonkeyPatch(), end_fails=True) as streams:
        before = streams[-1]
        try:
            capture(work, torch.Generator(), Stream())
        finally:
            assert streams[-1] is before, "the stream of the caller is current again"
