"""Batch norm with the statistics of the global batch instead of one process's share of it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ltat_fast.models.joint_batch import JOINT_NORMS, batches_in_this_call


def synchronise_batch_norm(model: nn.Module) -> nn.Module:
    """Synchronise the batch norm layers of ``model``, in place, if there is more than one process; return ``model``."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return model
    if next(model.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            synced = CpuSyncBatchNorm(module.num_features, module.eps, module.momentum, dtype=module.weight.dtype)
            synced.load_state_dict(module.state_dict())
            synced.train(module.training)
            model.set_submodule(name, synced)
    return model


def unknown_batch_norm(model: nn.Module) -> str | None:
    """Return the name of a batch norm of ``model`` that can be neither synchronised nor made joint, or None.

    timm's BatchNormAct2d is one. It would mix joint batches, and each process would use the statistics of its share.
    """
    known = (*JOINT_NORMS, *JOINT_NORMS.values(), CpuSyncBatchNorm)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and type(module) not in known:
            return name
    return None


class CpuSyncBatchNorm(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for CPUs: batch statistics over all processes, which must have shares of equal size."""

    running_mean: Tensor  # never None: synchronise_batch_norm() builds only layers that track statistics
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        number = batches_in_this_call()
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        batches = wide.view(number, -1, *x.shape[1:])
        moments = torch.stack([batches.mean((1, 3, 4)), batches.square().mean((1, 3, 4))])
        mean, square = _MeanOverProcesses.apply(moments)  # (number, C) each
        variance = (square - mean.square()).clamp_min(0)  # rounding can make it negative
        with torch.no_grad():
            n = x.numel() / x.shape[1] / number * dist.get_world_size()
            for batch in range(number):
                self.running_mean.lerp_(mean[batch], self.momentum)
                self.running_var.lerp_(variance[batch] * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += number
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        normalised = batches * scale[:, None, :, None, None] + shift[:, None, :, None, None]
        return normalised.to(x.dtype).view(x.shape)


class _MeanOverProcesses(torch.autograd.Function):
    """Mean of a tensor over processes. Its gradient is a mean too, because every process has its own loss."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _mean_over_processes(x.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _mean_over_processes(grad.clone())


def _mean_over_processes(x: Tensor) -> Tensor:
    dist.all_reduce(x)
    return x.div_(dist.get_world_size())
