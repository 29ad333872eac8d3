"""Linear layers whose products are computed by the fastest library of the device."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fp8 import fp8_linear

# Multiply-accumulates; with fewer, oneDNN takes longer to prepare than it saves: docs/performance.md, "the
# model's step, experiments".
_ENOUGH_WORK = 2**22


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

    On a CPU no scaled copy of the weight is kept for the backward, and in fp32 on the CPUs of
    `has_faster_onednn` the three products are oneDNN's. Compiled and exported graphs get the plain
    operations, and so does a GPU without an origin: a recomputed block then stops before its last product.

    origin: where given, x is not kept for the backward, but computed again. fp8: whether the products are in
    FP8, see `fp8_linear`.
    """
    if fp8:
        return _fp8(x, weight, bias, scale, origin)
    if torch.compiler.is_compiling():
        return F.linear(x, weight if scale == 1.0 else weight * scale, bias)
    kind = x.device.type
    compute = None if origin is None else origin.compute
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        compute = compute and partial(_under_autocast, compute, dtype)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    needs_copy = scale != 1.0 and kind == "cpu"
    if not (needs_copy or origin is not None or _uses_onednn(x, x.numel() * len(weight))):
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
        return _product(x.flatten(0, -2), weight, bias, scale).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # R O
        of_x = of_weight = None
        if needs_x:
            of_x = _product(rows, weight.t(), scale=ctx.scale).unflatten(0, gradient.shape[:-1])
        if needs_weight:
            x = source if ctx.compute is None else ctx.compute(source).to(ctx.dtype)
            of_weight = _product(rows.t(), x.flatten(0, -2).t())
            of_weight = of_weight if ctx.scale == 1.0 else of_weight.mul_(ctx.scale)
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None, None, None


def _under_autocast(compute: Callable[[Tensor], Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, dtype, cache_enabled=False):
        return compute(x)


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`scale * a @ b.T + bias`: R K, N K, N -> R N."""
    if not _uses_onednn(a, a.numel() * len(b)):
        return F.linear(a, b if scale == 1.0 else b * scale, bias)
    if scale == 1.0:
        return _onednn_product(a, b, bias)
    # The factor goes to the smallest of the three tensors.
    if len(a) * len(b) <= min(a.numel(), b.numel()):
        return _onednn_product(a, b, None if bias is None else bias / scale).mul_(scale)
    return _onednn_product(*((a * scale, b) if a.numel() <= b.numel() else (a, b * scale)), bias)


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # R K, N K, N -> R N
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def _uses_onednn(operand: Tensor, work: int) -> bool:
    """work: multiply-accumulates of the product."""
    is_fp32 = operand.device.type == "cpu" and operand.dtype == torch.float32
    return _HAS_FASTER_ONEDNN and is_fp32 and work >= _ENOUGH_WORK


def has_faster_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN's products in fp32 are faster here than those of PyTorch's `addmm`.

    They are on CPUs by AMD with AVX-512: `addmm` is MKL's, which has no AVX-512 for them. There oneDNN has
    twice the rate (docs/performance.md, "the model's step, experiments"). A fact of the machine, not a
    measurement at the start, so that all runs on it compute the same.
    """
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        vendor = next(line for line in cpuinfo.read_text().splitlines() if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return False
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_operator and vendor.endswith("AuthenticAMD")


_HAS_FASTER_ONEDNN = has_faster_onednn()
