"""Several processes that train as one: their ranks, averaged gradients, common decisions.

torchrun starts the processes, and each takes its share of every global batch. Batch norm uses statistics of the whole
global batch, and DistributedDataParallel averages the gradients, so that N processes follow the loss curve of one.
"""

import contextlib
import datetime
import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ltat_fast.errors import UserError

JOIN_TIMEOUT = datetime.timedelta(minutes=5)  # time limit for all processes to join; torch's own default is 30 minutes

# torch 2.13 renamed this argument, and warns about the old name.
_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"


@dataclass(frozen=True)
class World:
    """Place of this process: ``rank`` among all ``size`` processes, ``local_rank`` among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world_from_environment() -> World:
    """Read the world from the environment variables of torchrun. Without torchrun, return a world of one process."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    return World(
        rank=int(os.environ.get("RANK", 0)),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ.get("LOCAL_RANK", 0)),
    )


def start(use_cuda: bool) -> World:
    """Join the process group of torchrun: NCCL on GPUs, gloo on CPUs.

    Raises UserError if not all processes join within :data:`JOIN_TIMEOUT`.
    """
    world = world_from_environment()
    if world.size > 1:
        if use_cuda:
            torch.cuda.set_device(world.local_rank)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
            dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=size)
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the {world.size} processes of this run did not find each other: {reason}") from None
    return world


def is_lost_process_error(error: RuntimeError) -> bool:
    """Return whether a collective raised ``error`` because another process died.

    Gloo has no exception type for this, so this function examines the message.
    """
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def current() -> World:
    """Return the world of the joined process group, or a world of one process if there is no group."""
    return world_from_environment() if dist.is_initialized() else World()


def stop() -> None:
    """Leave the process group, if this process has joined one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_at_once(status: int) -> NoReturn:
    """Exit at once with ``status``, without the shutdown of the interpreter.

    If this or another process stopped in the middle of a step, gloo's threads still hold unfinished work of DDP. If a
    thread releases it during the shutdown, the process aborts with "terminate called without an active exception".
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wrap(model: nn.Module) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel. With a single process, return ``model`` itself.

    Buffers are not broadcast. Synchronised batch norm already keeps them equal, and the second of LTAT's two forward
    passes would overwrite buffers that the backward pass of the first one needs.
    """
    world = current()
    if world.size == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if on_gpu else None,
        **{_SYNC_BUFFERS: False},
        gradient_as_bucket_view=True,
    )


def mean_over_processes(x: Tensor) -> Tensor:
    """Average ``x`` over all processes, in place. It sums and then divides, because gloo cannot average."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def max_over_processes(x: Tensor) -> Tensor:
    """Take the element-wise maximum of ``x`` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_process(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true in at least one process. All processes must call this function."""
    if not dist.is_initialized():
        return flag
    return bool(max_over_processes(torch.tensor(float(flag), device=device)))


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the ``with`` block in the main process first, then in the others, which can use what it has prepared."""
    is_main = current().is_main
    if not is_main:
        wait()
    yield
    if is_main:
        wait()


def wait() -> None:
    """Wait until every process has called this function."""
    if dist.is_initialized():
        dist.barrier()


def gather_in_turn(parts: list[Tensor]) -> list[Tensor]:
    """Return the parts of all processes in order. Process r holds parts r, r + size, r + 2 size, ... of the whole."""
    world = current()
    if world.size == 1:
        return parts
    by_rank: list = [None] * world.size
    dist.all_gather_object(by_rank, parts)
    total = sum(len(share) for share in by_rank)
    return [by_rank[i % world.size][i // world.size] for i in range(total)]
