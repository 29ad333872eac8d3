"""Batch norm over the clips of all ranks, on CPUs and in compiled models, where `SyncBatchNorm` does not
work."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.linear import Origin


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalises rows with the mean and variance over the rows of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, eps: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # R C -> R C, C, C, ()
        """Normalised rows in float32; mean, sum of squared deviations and number of rows in float64.

        Every rank computes the last three from the same numbers in the same order, so they are equal bit
        for bit. The deviations are from each rank's own mean first: a sum of squares would lose digits if
        the mean is far from zero.
        """
        rows = rows.float()
        own_mean = rows.sum(0) / max(len(rows), 1)
        own_squares = (rows - own_mean).square().sum(0)
        own = torch.cat([own_mean.double(), own_squares.double(), own_mean.new_tensor([len(rows)]).double()])
        of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_ranks, own, group)
        means, squares, counts = torch.stack(of_ranks).split([rows.shape[1], rows.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        squares = (squares + counts * (means - mean).square()).sum(0)
        scale = (squares / count + eps).rsqrt().float()
        normalised = (rows - mean.float()) * scale
        ctx.save_for_backward(normalised, scale, count)
        ctx.group = group
        ctx.mark_non_differentiable(mean, squares, count)
        return normalised, mean, squares, count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        normalised, scale, count = ctx.saved_tensors
        sums = torch.stack([grad.sum(0), (grad * normalised).sum(0)]).double()
        dist.all_reduce(sums, group=ctx.group)
        of_grad, of_product = (sums / count).float()
        return scale * (grad - of_grad - normalised * of_product), None, None


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of B C ... over the clips of all ranks, as one process would compute it for all clips.

    Works with any backend that gathers float64, gloo included. Ranks may have different numbers of clips,
    or none, but all must run the same forwards and backwards in the same order. Statistics are at least
    float32, also under autocast; the output has the input's dtype. Running statistics are equal bit for bit
    on all ranks. In evaluation, and with one rank, this is torch's own batch norm.

    group: the ranks; None for all.
    """

    def __init__(self, channels: int, *, group: dist.ProcessGroup | None = None, **options: Any) -> None:
        super().__init__(channels, **options)
        self.group = group

    def forward(self, x: Tensor, keep: Callable[[Origin], None] | None = None) -> Tensor:
        """B C ... → B C ... keep: where ranks are gathered, is given how the rows of the output, R C, are
        computed again. A list would not do: ZeRO 3 and others that hook modules pass copies of lists."""
        if not self.training or self.is_alone:
            return super().forward(x)
        rows = x.movedim(1, -1)  # B ... C
        normalised, mean, squares, count = _NormaliseOverRanks.apply(
            rows.flatten(0, -2), self.eps, self.group
        )
        self._update_running_statistics(mean, squares / (count - 1))
        if keep is not None:
            # Copies, as ZeRO 3 gathers the weights for this call only.
            own = [None if p is None else p.detach().clone() for p in (self.weight, self.bias)]
            keep(Origin(partial(_scaled, *own), normalised))
        return _scaled(self.weight, self.bias, normalised).view(rows.shape).movedim(-1, 1).to(x.dtype)

    @property
    def is_alone(self) -> bool:
        """Whether there is one rank only, so that nothing is gathered."""
        return not dist.is_initialized() or dist.get_world_size(self.group) == 1

    def _update_running_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, if tracked, as torch's batch norm does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.mul_(1 - share).add_(mean, alpha=share)
        self.running_var.mul_(1 - share).add_(variance, alpha=share)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch norm takes B C ..., not {input.dim()} dimensions")


def _scaled(weight: Tensor | None, bias: Tensor | None, normalised: Tensor) -> Tensor:  # C, C, R C -> R C
    if weight is None or bias is None:
        return normalised
    return torch.addcmul(bias.float(), normalised, weight.float())


@contextlib.contextmanager
def frozen_running_statistics(module: nn.Module) -> Iterator[None]:
    """A context in which batch norms use the batch's statistics without updating the running ones.

    Recomputation runs a block twice on the same batch, and the second run must not count it again. It
    updates copies instead, as autograd requires that both runs save the same tensors. A norm over all ranks
    gathers again; every rank recomputes the same blocks in the same order.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm.named_buffers(recurse=False)) for norm in norms]
    for norm, buffers in zip(norms, kept, strict=True):
        for name, buffer in buffers.items():
            setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


def normalise(norm: nn.Module, rows: Tensor) -> tuple[Tensor, Origin | None]:  # R C -> R C
    """The output of a batch norm, and how it is computed again: with equal bits, without communication, and
    without another update of the running statistics.

    The origin is None for `SyncBatchNorm`, which hands out no statistics, and in evaluation, as running
    statistics may change before the backward.
    """
    if not norm.training or not isinstance(norm, nn.BatchNorm1d | GlobalBatchNorm):
        return norm(rows), None
    if isinstance(norm, GlobalBatchNorm) and not norm.is_alone:
        origins: list[Origin] = []
        return norm(rows, origins.append), *origins
    return norm(rows), Origin(partial(_normalise_again, norm), rows)


def _normalise_again(norm: nn.Module, rows: Tensor) -> Tensor:
    """Calls the module: ZeRO 3 gathers its weights for that only."""
    was_training = norm.training
    norm.train()
    try:
        with frozen_running_statistics(norm):
            result: Tensor = norm(rows)
    finally:
        norm.train(was_training)
    return result


def convert_batch_norm(model: nn.Module, device: torch.device, *, compiled: bool = False) -> nn.Module:
    """The model with batch norm statistics over the clips of all ranks.

    Call it after the default process group is initialised and before anything keeps references to the
    model's modules. The norms become `SyncBatchNorm` on CUDA, else `GlobalBatchNorm`; also for a compiled
    model, as `GlobalBatchNorm` compiles into one graph. Parameters and buffers stay the same objects under
    the same names. With one rank nothing changes. Use the returned model: one that is itself a batch norm
    is not changed in place.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return model
    if device.type == "cuda" and not compiled:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return _convert(model)


def _convert(module: nn.Module) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return _to_global(module)
    for name, child in module.named_children():
        setattr(module, name, _convert(child))
    return module


def _to_global(norm: _BatchNorm) -> GlobalBatchNorm:
    new = GlobalBatchNorm(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        affine=norm.affine,
        track_running_stats=norm.track_running_stats,
    )
    for name, parameter in norm.named_parameters():
        setattr(new, name, parameter)
    for name, buffer in norm.named_buffers():
        setattr(new, name, buffer)
    return new.train(norm.training)
