"""Linear layers whose products are computed in FP8, for training.

Activations and weights are rounded to e4m3 (4 bits of exponent, 3 of mantissa), gradients to e5m2, each
tensor with a scale of its own, which is computed from the tensor at hand: there is no state. A scale is a
power of two, so dividing by it rounds nothing, and a tensor's scale changes results only where numbers are
too small for the format.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

MULTIPLE = 16
"""What all sides of a product in FP8 must be a multiple of; rows are padded."""
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 1e-30  # of the largest value: the scale of a tensor of zeros


def fp8_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    compute: Callable[[Tensor], Tensor] | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """`scale * x @ weight.T + bias` with products in FP8: ... I, O I, O -> ... O, in the dtype of x.

    I and O are multiples of `MULTIPLE`. compute, source: of an `Origin` of x; where given, x is computed
    again for the backward, else its FP8 copy is kept, half as large as in bf16.
    """
    rows = x.flatten(0, -2)
    kept = rows.detach() if source is None else source.detach()
    result: Tensor = _Fp8Linear.apply(rows, weight, bias, scale, compute, kept)
    return result.unflatten(0, x.shape[:-1])


class _Fp8Linear(torch.autograd.Function):
    """`fp8_linear` of rows, with the gradients of a linear layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # R I
        weight: Tensor,  # O I
        bias: Tensor | None,
        scale: float,
        compute: Callable[[Tensor], Tensor] | None,
        source: Tensor,
    ) -> Tensor:  # R O
        rounded, x_scale = _quantise(x, FORWARD)
        ctx.scale, ctx.compute, ctx.dtype = scale, compute, x.dtype
        # The weight is rounded again in the backward: its copies would be kept for all layers.
        kept = (rounded, x_scale) if compute is None else (source, None)
        ctx.save_for_backward(weight, *kept)
        weight8, weight_scale = _quantise(weight, FORWARD)
        return _product(rounded, weight8.t(), x_scale, weight_scale * scale, x.dtype, bias=bias, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, kept, x_scale = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        gradient8, gradient_scale = _quantise(gradient, BACKWARD)
        of_x = of_weight = None
        if needs_x:
            weight8, weight_scale = _quantise(weight, FORWARD)
            columns = weight8.t().contiguous().t()  # O I, columns contiguous
            of_x = _product(gradient8, columns, gradient_scale, weight_scale * ctx.scale, gradient.dtype)
        if needs_weight:
            x8 = kept
            if ctx.compute is not None:
                x8, x_scale = _quantise(ctx.compute(kept).to(ctx.dtype).flatten(0, -2), FORWARD)
            of_weight = _product(
                _padded(gradient8).t().contiguous(),
                _padded(x8).t().contiguous().t(),
                gradient_scale,
                x_scale * ctx.scale,
                weight.dtype,
            )
        return of_x, of_weight, gradient.sum(0) if needs_bias else None, None, None, None


def _quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in FP8, and the factor by which it is to be multiplied. NaN where x is not finite."""
    largest = torch.finfo(dtype).max
    amax = x.abs().amax().float().clamp(min=_LEAST)
    scale = torch.exp2(torch.ceil(torch.log2(amax / largest)))
    # Rounded logarithms may be too small by one; without the bound, infinity would follow.
    return (x * (1 / scale).to(x.dtype)).clamp(-largest, largest).to(dtype), scale


def _product(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """`a @ b` times both scales, plus bias: M K, K N, N -> M N. The columns of b are contiguous.

    fast: whether the GPU may add up with less precision, as is usual in the forward.
    """
    result: Tensor = torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=fast)
    return result if bias is None else result + bias.to(dtype)


def _padded(x: Tensor) -> Tensor:  # R N -> R' N
    """With rows of zeros up to a multiple of `MULTIPLE`."""
    missing = -len(x) % MULTIPLE
    return F.pad(x.view(torch.uint8), (0, 0, 0, missing)).view(x.dtype) if missing else x
