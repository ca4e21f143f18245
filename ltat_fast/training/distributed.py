"""Many processes as one run: who this process is, gradients and batch statistics over all of them, agreement.

Started by torchrun, each process takes its share of every global batch; batch norm sees the whole global batch, and
gradients are averaged by DistributedDataParallel, so that N processes follow the loss curve of one.
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

JOIN_WITHIN = datetime.timedelta(minutes=5)  # from the first process to the last; torch would wait for half an hour

# The flag has a new name since torch 2.13, and the old one warns.
_BUFFERS = "forward_sync_buffers"
if _BUFFERS not in inspect.signature(DistributedDataParallel.__init__).parameters:
    _BUFFERS = "broadcast_buffers"


@dataclass(frozen=True)
class World:
    """rank: of this process among ``size``. local_rank: among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def launched() -> World:
    """What torchrun says of this process; a world of one without it."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    rank, size, local_rank = (int(os.environ.get(*d)) for d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    return World(rank, size, local_rank)


def start(use_cuda: bool) -> World:
    """Join the processes that torchrun started: NCCL between GPUs, gloo between CPUs.

    Raises UserError if they are not all there in time.
    """
    world = launched()
    if world.size > 1:
        if use_cuda:
            torch.cuda.set_device(world.local_rank)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=JOIN_WITHIN))
            dist.init_process_group("nccl" if use_cuda else "gloo", store=store, rank=rank, world_size=size)
        except dist.DistError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"the {world.size} processes of this run did not find each other: {reason}") from None
    return world


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective raises when another process is gone. Gloo gives it no type of its own."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error))


def current() -> World:
    """This process in the group it has joined; a world of one if in none."""
    return launched() if dist.is_initialized() else World()


def stop() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave_broken(status: int) -> NoReturn:
    """End this process at once, in a group that has lost a member.

    What DDP had under way stays with gloo's threads. One that lets go of it while the interpreter shuts down aborts
    the process ("terminate called without an active exception"), so nothing is shut down.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def wrap(model: nn.Module) -> nn.Module:
    """``model`` with gradients averaged over all processes; ``model`` itself where there is one.

    Buffers are not broadcast: synchronised batch norm keeps them equal, and LTAT's two forwards before one backward
    would have the second overwrite what the first needs.
    """
    world = current()
    if world.size == 1:
        return model
    on_gpu = next(model.parameters()).is_cuda
    return DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if on_gpu else None,
        **{_BUFFERS: False},
        gradient_as_bucket_view=True,
    )


def mean_over_processes(x: Tensor) -> Tensor:
    """In place. Divided after the sum: NCCL alone knows an average."""
    if dist.is_initialized():
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


def largest_of_processes(x: Tensor) -> Tensor:
    """In place, element by element."""
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` is set in at least one process; all must ask."""
    return bool(largest_of_processes(torch.tensor(float(flag), device=device))) if dist.is_initialized() else flag


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The main process goes through the body alone; the others after it, and find what it has prepared."""
    is_main = current().is_main
    if not is_main:
        wait()
    yield
    if is_main:
        wait()


def wait() -> None:
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def gather_in_turn(parts: list[Tensor]) -> list[Tensor]:
    """The parts of all processes, where process r holds parts r, r + size, r + 2 size, ... of the whole."""
    world = current()
    if world.size == 1:
        return parts
    everyone: list[list[Tensor]] = [[]] * world.size
    dist.all_gather_object(everyone, parts)
    total = sum(len(theirs) for theirs in everyone)
    return [everyone[i % world.size][i // world.size] for i in range(total)]
