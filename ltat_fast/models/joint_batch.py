"""Several batches through a network in one call, each with its own batch-norm statistics.

IGDM needs the student at x + d and at x - d. Two calls in train mode launch every kernel twice and add every weight
gradient to ``.grad`` in a second pass. :func:`forward_each` makes one call on the concatenated batches instead. In that
call every batch norm normalises each batch with the statistics of that batch and updates its running statistics with
one batch after the other, so that logits, gradients and running statistics are those of separate calls.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeGuard

import torch
from torch import Tensor, nn

# Plain globals, because torch.compile can guard on them.
_enabled = False  # whether forward_each makes one call
_batches = 1  # number of batches that the current call holds


def forward_each(model: Callable[[Tensor], Tensor], *batches: Tensor) -> tuple[Tensor, ...]:
    """Return ``model(batch)`` for each of ``batches``, in one call inside :func:`joint_calls`.

    batches: images ``(B, C, H, W)``, all of one shape.
    """
    if not _enabled:
        return tuple(model(batch) for batch in batches)
    with _batches_in_one_call(len(batches)):
        logits = model(torch.cat(batches))
    return tuple(logits.chunk(len(batches)))


@contextlib.contextmanager
def joint_calls(enabled: bool) -> Iterator[None]:
    """In this context :func:`forward_each` makes one call. The model must come from :func:`allow_joint_calls`."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


@contextlib.contextmanager
def _batches_in_one_call(number: int) -> Iterator[None]:
    global _batches
    before, _batches = _batches, number
    try:
        yield
    finally:
        _batches = before


def batches_in_this_call() -> int:
    """Return how many batches the input of the current forward pass holds, one after the other."""
    return _batches


def allow_joint_calls(model: nn.Module) -> nn.Module:
    """Replace the batch norms of ``model``, in place, by ones that keep joint batches apart; return ``model``.

    Parameters, buffers and their names stay the same. Call it after
    :func:`~ltat_fast.models.sync_batch_norm.synchronise_batch_norm`. Raises ValueError for a network that is itself a
    batch norm.
    """
    for name, module in list(model.named_modules()):
        if _mixes_batches(module):
            if not name:
                raise ValueError("a batch norm alone cannot be replaced in place")
            model.set_submodule(name, _converted(module))
    return model


def check_joint_calls(model: nn.Module) -> None:
    """Raise ValueError if ``model`` has a batch norm that would mix the batches of a joint call."""
    for name, module in model.named_modules():
        if _mixes_batches(module):
            raise ValueError(f"{name} would mix the batches of a joint call: prepare the model with allow_joint_calls")


def _mixes_batches(module: nn.Module) -> TypeGuard[nn.BatchNorm2d | nn.SyncBatchNorm]:
    return type(module) in JOINT_NORMS


def _converted(module: nn.BatchNorm2d | nn.SyncBatchNorm) -> nn.Module:
    """Return a joint batch norm that holds the same parameter and buffer objects as ``module``."""
    kind = JOINT_NORMS[type(module)]
    joint = kind(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
    for name, parameter in module.named_parameters(recurse=False):
        joint.register_parameter(name, parameter)
    for name, buffer in module.named_buffers(recurse=False):
        joint.register_buffer(name, buffer)
    if isinstance(module, nn.SyncBatchNorm):
        joint.process_group = module.process_group
    return joint.train(module.training)


class JointBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that normalises each batch of a joint call with its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if _batches == 1 or not self.training:
            return super().forward(x)
        if torch.compiler.is_compiling() and self.momentum is not None and self.running_mean is not None:
            return self._in_one_pass(x, self.momentum)
        return torch.cat([super(JointBatchNorm2d, self).forward(batch) for batch in x.chunk(_batches)])

    def _in_one_pass(self, x: Tensor, momentum: float) -> Tensor:
        """Compute :meth:`forward` with plain arithmetic, which Inductor fuses into the layers around it."""
        assert self.running_mean is not None  # checked by forward(); the other two buffers are None only if this one is
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        batches = x.view(_batches, -1, *x.shape[1:])
        wide = batches.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(wide, (1, 3, 4), correction=0)  # (batches, C)
        with torch.no_grad():
            n = x.numel() / x.shape[1] / _batches
            for batch in range(_batches):
                self.running_mean.lerp_(mean[batch].to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((variance[batch] * (n / (n - 1))).to(self.running_var.dtype), momentum)
            self.num_batches_tracked.add_(_batches)
        scale = torch.rsqrt(variance + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = self.weight * scale, self.bias + self.weight * shift
        normalised = wide * scale[:, None, :, None, None] + shift[:, None, :, None, None]
        return normalised.to(x.dtype).view(x.shape)


class JointSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that normalises each batch of a joint call with its own statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if _batches == 1 or not self.training:
            return super().forward(x)
        return torch.cat([super(JointSyncBatchNorm, self).forward(batch) for batch in x.chunk(_batches)])


JOINT_NORMS: dict[type, type] = {nn.BatchNorm2d: JointBatchNorm2d, nn.SyncBatchNorm: JointSyncBatchNorm}
