"""Linear layers whose products are computed by the fastest library of the device."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fp8 import fp8_linear
from models.products import Library, library_of, product


@dataclass(frozen=True)
class Origin:
    """How the input of a linear layer is computed again, from a tensor that is kept anyway."""

    compute: Callable[[Tensor], Tensor]
    """Without effects, such as a layer norm or an activation. Called in the backward, without gradients, and
    under autocast where the forward was."""
    source: Tensor


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    origin: Origin | None = None,
    fp8: bool = False,
) -> Tensor:
    """`scale * x @ weight.T + bias`: ... I, O I, O -> ... O.

    On a CPU no scaled copy of the weight is kept for the backward, and the three products are those of
    `product`. Compiled, exported and traced graphs get the plain operations, and so does a GPU without an
    origin: a recomputed block then stops before its last product.

    origin: where given, x is not kept for the backward, but computed again. fp8: whether the products are in
    FP8, see `fp8_linear`.
    """
    if fp8:
        return _fp8(x, weight, bias, scale, origin)
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return F.linear(x, weight if scale == 1.0 else weight * scale, bias)
    kind = x.device.type
    compute = None if origin is None else origin.compute
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        compute = compute and partial(_under_autocast, compute, dtype)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    needs_copy = scale != 1.0 and kind == "cpu"
    if not (needs_copy or origin is not None or library_of(x, len(weight)) is not Library.PYTORCH):
        return F.linear(x, weight if scale == 1.0 else weight * scale, bias)
    source = x if origin is None else origin.source
    result: Tensor = _Linear.apply(x, weight, bias, scale, compute, source.detach())
    return result


def _fp8(x: Tensor, weight: Tensor, bias: Tensor | None, scale: float, origin: Origin | None) -> Tensor:
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))  # the weight is rounded from float32
    if origin is None or torch.compiler.is_compiling():
        return fp8_linear(x, weight, bias, scale=scale)
    return fp8_linear(x, weight, bias, scale=scale, compute=origin.compute, source=origin.source)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`; in training with products in FP8, where `use_fp8` says so."""

    fp8 = False

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:  # ... I -> ... O
        return linear(x, self.weight, self.bias, origin=origin, fp8=self.fp8 and self.training)


class _Linear(torch.autograd.Function):
    """`linear` with the gradients of a linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        compute: Callable[[Tensor], Tensor] | None,
        source: Tensor,
    ) -> Tensor:
        _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(source if needs_weight else None, weight)
        ctx.scale, ctx.compute, ctx.dtype = scale, compute, x.dtype
        return product(x.flatten(0, -2), weight, bias, scale).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # R O
        of_x = of_weight = None
        if needs_x:
            of_x = product(rows, weight.t(), scale=ctx.scale).unflatten(0, gradient.shape[:-1])
        if needs_weight:
            x = source if ctx.compute is None else ctx.compute(source).to(ctx.dtype)
            of_weight = product(rows.t(), x.flatten(0, -2).t())
            of_weight = of_weight if ctx.scale == 1.0 else of_weight.mul_(ctx.scale)
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None, None, None


def _under_autocast(compute: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype, cache_enabled=False):
        return compute(x)
