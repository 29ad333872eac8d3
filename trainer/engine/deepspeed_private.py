"""Imports DeepSpeed, and all uses of its private or undocumented members (version 0.19)."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed (seconds, so late) for this device, with nothing compiled at start.

    Raises RuntimeError where this version lacks a function that is replaced here.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    else:
        # DeepSpeed uses the GPU with this number; a task that sees its own GPU only has number 0 of it.
        os.environ["LOCAL_RANK"] = str(device.index)
    # DeepSpeed 0.19 calls collectives by names that torch 2.14 deprecates, thousands of times a run.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    with _unavailable("mlflow"):  # seconds, for DeepSpeed's autotuner, which is not used here
        import deepspeed
    from deepspeed.runtime import bf16_optimizer
    from deepspeed.utils.logging import logger

    # "You are using ZeRO with an untested optimizer": this one is tested, in tests/trainer/engine.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # It prints five lines, and collects garbage, twice for each group of parameters.
    _replace(bf16_optimizer, "see_memory_usage", lambda *_, **__: None)
    _keep_norms_on_device()
    if device.type == "cpu":
        import deepspeed.ops

        # `init_distributed` would compile a shared-memory collective, which takes over a minute. On a GPU it
        # does not, and reading this table would try every compiler.
        _member(deepspeed.ops, "__compatible_ops__")["deepspeed_shm_comm"] = False
    return deepspeed


@contextmanager
def _unavailable(package: str) -> Iterator[None]:
    """Inside, importing the package fails, unless it has been imported before."""
    known = package in sys.modules
    if not known:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not known:
            del sys.modules[package]


def use_group(group: Any) -> None:
    """Have all engines work in this process group, which must hold all ranks."""
    from deepspeed.utils import groups

    _replace(groups, "_WORLD_GROUP", group)


# --- the gradient's norm, without the host reading it -----------------------------------------------------


def _keep_norms_on_device() -> None:
    """Replace the functions with which DeepSpeed reads the norm on the host, which waits for the device.

    It reads the norm to skip a step whose gradient is not finite. `SkippableAdamW` skips that itself.
    """
    from deepspeed.runtime import bf16_optimizer, utils
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    for module in (bf16_optimizer, stage3, stage_1_and_2):
        _replace(module, "is_invalid_grad_norm", _never_invalid)
    _replace(bf16_optimizer, "clip_tensors_by_global_norm", _clip)
    for module in (utils, stage3, stage_1_and_2):
        _replace(module, "mask_nan_or_inf_with_val_inplace", _mark)


def _never_invalid(norm: Any) -> bool:
    return False


def _clip(input_tensors: Iterable[Tensor], max_norm: float = 1.0, global_norm: Any = None, **_: Any) -> Any:
    """Scale gradients down to `max_norm`, as DeepSpeed does where it reads the norm."""
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + 1e-6)).clamp(max=1.0))
    return global_norm


def _mark(input: Tensor, device: Any = None, val: float = -1.0) -> None:
    """Write `val` for a norm that is not finite; DeepSpeed copies it from the host, which waits too."""
    input.masked_fill_(input.isfinite().logical_not(), val)


def gradient_norm(engine: Any) -> Tensor:
    """The norm of the whole gradient at the last step, on the device; ZeRO stages 1 to 3 only.

    DeepSpeed writes -1 or infinity for one that is not finite.
    """
    norm: Tensor = _member(engine.optimizer, "_global_grad_norm")
    return norm


# --- the training state -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class MasterPart:
    """This rank's part of one parameter, in the tensor that the optimiser updates."""

    start: int
    """The part's first element, counted in the flattened parameter."""
    shape: tuple[int, ...]
    """Of the whole parameter."""
    tensor: Tensor
    """What the optimiser updates; it may hold parts of other parameters too."""
    offset: int
    """The part's first element, counted in the flattened `tensor`."""
    count: int
    """Elements of the part."""
    optimiser: torch.optim.Optimizer | None
    """The optimiser that has the moments of `tensor`; None for a frozen parameter."""
    replicated: bool
    """Whether all ranks hold this same part."""


def find_master_part(engine: Any, stage: int, parameter: nn.Parameter) -> MasterPart | None:
    """Where this rank holds a parameter; None where other ranks hold all of it."""
    if stage == 3:
        return _partitioned_part(engine.optimizer, parameter)
    if stage > 0 and parameter.requires_grad:
        return _flattened_part(engine.optimizer, parameter)
    optimiser = base_optimizer(engine) if parameter.requires_grad else None
    shape, count = tuple(parameter.shape), parameter.numel()
    return MasterPart(0, shape, parameter, 0, count, optimiser, replicated=True)


def _flattened_part(optimizer: Any, parameter: nn.Parameter) -> MasterPart | None:
    """Stages 1 and 2: each group of parameters is one flat tensor, cut into equal partitions."""
    mapping = _member(parameter, "_hp_mapping")
    if mapping is None:
        return None
    partitions = _member(optimizer, "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    address = _member(mapping, "hp_fragment_address")
    return MasterPart(
        start=_member(mapping, "lp_fragment_address").start,
        shape=tuple(parameter.shape),
        tensor=partitions[_member(mapping, "param_group_index")],
        offset=address.start,
        count=address.numel,
        optimiser=optimizer.optimizer,
        replicated=False,
    )


def _partitioned_part(optimizer: Any, parameter: nn.Parameter) -> MasterPart:
    """Stage 3: each parameter is cut into one part per rank, all of equal length, the last ones padded."""
    size = _member(parameter, "partition_numel")()
    start = _member(optimizer, "_get_param_partition_rank")(parameter) * size
    tensor, offset = _member(parameter, "ds_tensor"), 0
    if parameter.requires_grad:
        position = _member(optimizer, "get_param_id")(parameter)
        group, offset, size = _member(optimizer, "grad_position")[position]
        tensor = _member(optimizer, "fp32_partitioned_groups_flat")[group]
    return MasterPart(
        start=start,
        shape=tuple(_member(parameter, "ds_shape")),
        tensor=tensor,
        offset=offset,
        count=max(0, min(size, _member(parameter, "ds_numel") - start)),
        optimiser=optimizer.optimizer if parameter.requires_grad else None,
        replicated=False,
    )


def sync_model_weights(engine: Any, stage: int) -> None:
    """Copy the weights that the optimiser updates to those that the model computes with. Collective."""
    optimizer = engine.optimizer
    if stage == 3:
        _member(optimizer, "_partition_all_parameters")()
        reassign = _member(optimizer, "_reassign_or_swap_out_partitioned_parameters")
        for group in range(len(_member(optimizer, "fp16_groups"))):
            reassign(group)
        _member(optimizer, "_post_step")(set())  # small parameters stay gathered: gathers them again
    elif stage > 0:
        _member(optimizer, "update_lp_params")()


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimiser that was given to DeepSpeed."""
    optimiser: torch.optim.Optimizer = _member(engine, "basic_optimizer")
    return optimiser


def read_counters(engine: Any) -> dict[str, int]:
    """What an engine counts: steps, samples, micro-batches, skipped steps."""
    return {name: _member(engine, name) for name in _COUNTERS}


def set_counters(engine: Any, counters: dict[str, int]) -> None:
    for name, value in counters.items():
        setattr(engine, name, value)


def _member(owner: Any, *names: str) -> Any:
    """The first of these members that `owner` has. Raises RuntimeError where it has none."""
    for name in names:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise _missing(owner, " or ".join(names))


def _replace(module: ModuleType, name: str, value: Callable[..., Any] | Any) -> None:
    """Set a module's member. Raises RuntimeError where there is none: DeepSpeed would not use the new one."""
    if not hasattr(module, name):
        raise _missing(module, name)
    setattr(module, name, value)


def _missing(owner: Any, name: str) -> RuntimeError:
    import deepspeed

    kind = owner.__name__ if isinstance(owner, ModuleType) else type(owner).__name__
    return RuntimeError(
        f"DeepSpeed {deepspeed.__version__}: {kind} has no member {name}, which {__name__} needs; install a "
        "version that setup.py names"
    )
