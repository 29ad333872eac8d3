"""Linear layers whose products are computed by the fastest library of the device."""

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ENOUGH_ROWS = 64  # with fewer, oneDNN's preparation of the operands costs more than it saves


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
    """`scale * x @ weight.T + bias`: ... I, O I, O -> ... O.

    No scaled copy of the weight is kept for the backward. In fp32 on the CPUs of `has_faster_onednn` the
    three products are oneDNN's. Compiled and exported graphs get the plain operations.
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight if scale == 1.0 else weight * scale, bias)
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if scale == 1.0 and not _uses_onednn(x.dtype, x.device, x.shape[:-1].numel()):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, scale)
    return result


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`."""

    def forward(self, x: Tensor) -> Tensor:  # ... I -> ... O
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """`linear` with the gradients of a linear layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        _, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight)
        ctx.scale = scale
        return _product(x.flatten(0, -2), weight, bias, scale).unflatten(0, x.shape[:-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)  # R O
        of_x = of_weight = None
        if needs_x:
            of_x = _product(rows, weight.t(), None, ctx.scale).unflatten(0, gradient.shape[:-1])
        if needs_weight:
            of_weight = _product(rows.t(), x.flatten(0, -2).t(), None, ctx.scale)
        return of_x, of_weight, rows.sum(0) if needs_bias else None, None


def _product(a: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:  # R K, N K, N -> R N
    """`scale * a @ b.T + bias`."""
    if not _uses_onednn(a.dtype, a.device, max(a.shape)):
        if bias is None and scale == 1.0:
            return a @ b.t()
        start = a.new_empty(()) if bias is None else bias
        return torch.addmm(start, a, b.t(), beta=0 if bias is None else 1, alpha=scale)
    of_result = len(a) * len(b)
    if scale == 1.0:
        return _onednn_product(a, b, bias)
    if of_result <= min(a.numel(), b.numel()):  # the factor goes to the smallest of the three
        return _onednn_product(a, b, None if bias is None else bias / scale).mul_(scale)
    return _onednn_product(*((a * scale, b) if a.numel() <= b.numel() else (a, b * scale)), bias)


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:  # R K, N K, N -> R N
    result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return result


def _uses_onednn(dtype: torch.dtype, device: torch.device, rows: int) -> bool:
    return _HAS_FASTER_ONEDNN and device.type == "cpu" and dtype == torch.float32 and rows >= _ENOUGH_ROWS


def has_faster_onednn(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether oneDNN's products in fp32 are faster here than those of PyTorch's `addmm`.

    They are on CPUs by AMD with AVX-512: `addmm` is MKL's, which has no AVX-512 for them. There oneDNN has
    twice the rate. A fact of the machine, not a measurement, so that all runs on it compute the same.
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
