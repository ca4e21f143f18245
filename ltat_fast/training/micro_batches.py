"""Gradient of a batch from N micro-batches of equal size, with the activations of one of them at a time in memory.

Most losses are means over images. Their gradient is the mean of the gradients of the micro-batches
(:func:`backward_each`). Some losses couple the images of a batch. For these the outputs of the student come first,
without activations. The loss on all of them gives the gradient with respect to each output, and every micro-batch is
then computed again to carry this gradient to the weights (:func:`backward_coupled`): one more forward pass.

Source of the second way: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
Setup", RepL4NLP 2021, section 3.2 (gradient cache).

Both ways equal one batch up to rounding if no layer couples images. Batch norm does: it takes the statistics of a
micro-batch. Dropout draws other masks than for one batch.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ltat_fast.methods.base import Parts

Context = Callable[[], contextlib.AbstractContextManager]
Loss = Callable[..., tuple[Tensor, Parts]]


def split(number: int, x: Tensor) -> tuple[Tensor, ...]:
    """Return the ``number`` equal parts of ``x`` along its first dimension: views, or ``x`` itself if it is one part.

    Raises ValueError if ``x`` does not split evenly.
    """
    if len(x) % number:
        raise ValueError(f"a batch of {len(x)} images does not split evenly into {number} micro-batches")
    return (x,) if number == 1 else x.split(len(x) // number)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Undo :func:`split`."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def has_batch_norm(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def backward_each(loss: Loss, batches: Sequence[tuple[Tensor, ...]], no_sync: Context) -> Parts:
    """Add the gradient of the mean loss over ``batches`` to ``.grad``. Return the means of "loss" and of its parts.

    loss: from a batch to the loss and its parts. no_sync: context in which DistributedDataParallel does not average
    gradients over processes; it does so only after the last micro-batch.
    """
    if len(batches) == 1:
        value, parts = loss(*batches[0])
        value.backward()
        return {"loss": value.detach(), **parts}
    means: Parts = {}
    for number, batch in enumerate(batches, 1):
        with contextlib.nullcontext() if number == len(batches) else no_sync():
            value, parts = loss(*batch)
            (value / len(batches)).backward()
        for name, part in {"loss": value.detach(), **parts}.items():
            share = part / len(batches)
            means[name] = means[name] + share if name in means else share
    return means


class OutputsFirst:
    """A student that computes its outputs in ``number`` micro-batches and keeps no activations.

    student: network in train mode. precision: context of a forward pass of the student. no_sync: as for
    :func:`backward_each`.
    """

    def __init__(self, student: Callable, number: int, precision: Context, no_sync: Context):
        self.student, self.number, self.precision, self.no_sync = student, number, precision, no_sync
        self.calls: list[tuple[Tensor, tuple[Tensor, ...]]] = []

    def __call__(self, x: Tensor):
        """Return what ``student(x)`` returns: one or several tensors ``(B, ...)``, leaves that take gradients."""
        if x.requires_grad:
            raise ValueError("a loss that couples images cannot contain input gradients with several micro-batches")
        with torch.no_grad():
            outputs = [self.student(part) for part in split(self.number, x)]
        several = isinstance(outputs[0], tuple)
        leaves = tuple(torch.cat(of).requires_grad_() for of in (zip(*outputs, strict=True) if several else [outputs]))
        self.calls.append((x, leaves))
        return leaves if several else leaves[0]

    def backward(self) -> None:
        """Carry the gradients of the outputs, which the loss has set, to the weights."""
        todo = []
        for x, leaves in self.calls:
            grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            todo += zip(split(self.number, x), zip(*(split(self.number, g) for g in grads), strict=True), strict=True)
        for place, (x, grads) in enumerate(todo, 1):
            with contextlib.nullcontext() if place == len(todo) else self.no_sync():
                with self.precision():
                    outputs = self.student(x)
                torch.autograd.backward(outputs, grads)


def backward_coupled(loss: Loss, batch: tuple[Tensor, ...], student: OutputsFirst, model: nn.Module) -> Parts:
    """Add the gradient of the loss on ``batch`` to ``.grad``. Return "loss" and its parts.

    loss: from a batch and a student to the loss and its parts. model: the network behind ``student``. Its buffers,
    which are the statistics of batch norm, count only the forward passes that have activations, and both passes of a
    network with dropout draw the same masks.
    """
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    cuda = [batch[0].device] if batch[0].is_cuda else []
    with torch.random.fork_rng(cuda, enabled=getattr(model, "draws_in_training", False)):
        value, parts = loss(*batch, student)
    value.backward()
    with torch.no_grad():
        for buffer, saved in zip(buffers, before, strict=True):
            buffer.copy_(saved)
    student.backward()
    return {"loss": value.detach(), **parts}
