"""DeepSpeed's optimisers without reading the gradient's norm on the host, which waits for the device."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def keep_norms_on_device() -> None:
    """Replace what DeepSpeed 0.19 looks up in its own modules, for all of its optimisers in this process.

    It reads the norm to skip a step whose gradient is not finite. `SkippableAdamW` skips that itself.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        _replace(module, "is_invalid_grad_norm", _never_invalid)
    _replace(bf16_optimizer, "clip_tensors_by_global_norm", _clip)
    for module in (utils, stage3, stage_1_and_2):
        _replace(module, "mask_nan_or_inf_with_val_inplace", _mark)


def _replace(module: ModuleType, name: str, function: Callable[..., Any]) -> None:
    """Raises RuntimeError where this version of DeepSpeed has no such function: the host would wait again."""
    if not hasattr(module, name):
        raise RuntimeError(f"{module.__name__} of this DeepSpeed has no {name}; see {__name__}")
    setattr(module, name, function)


def _never_invalid(norm: Any) -> bool:
    return False


def _clip(input_tensors: Iterable[Tensor], max_norm: float = 1.0, global_norm: Any = None, **_: Any) -> Any:
    """Scale gradients down to `max_norm`, as DeepSpeed does where it reads the norm."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1.0))
    return global_norm


def _mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Write `val` for a norm that is not finite; DeepSpeed copies it from the host, which waits too."""
    input.masked_fill_(input.isfinite().logical_not(), val)
