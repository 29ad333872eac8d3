"""The time of a training step on paper, for every batch plan: what `auto` compares plans by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from models import UniFormerV2Config
from models.config import OUTSIDE_BLOCKS
from trainer.engine.memory_estimate import MemoryModel
from trainer.engine.step_kernels import FP8_PRODUCTS, Device, Kernel, record_step, update_kernel

_PRIME = 1_000_003
"""Larger than any number of a model's config: only what is proportional to the clips is a multiple of it."""
ANY_BATCH = 16 * _PRIME
"""Clips. The rows of products in FP8, padded to a multiple of 16, are the clips' then, too."""

_H100 = Device()
_FP32_FLOPS = 51e12
"""Of an H100 without TF32: docs/performance.md, "2026-11-26: the first GPU"."""
_CPU = Device(flops=200e9, bandwidth=20e9, least=0.0, launch=5e-6, fp8=100e9)
_EXCHANGE = {"cuda": 50e9, "cpu": 5e9}
"""Bytes per second that a rank exchanges with the others, by kind of device. Assumed: a network adapter of
400 Gbit/s for each GPU. Inside a node they are faster."""


@dataclass(frozen=True)
class StepCost:
    """Times of the plans of one training, on paper: those of an H100, or of two cores of a CPU.

    Other devices are assumed to differ by the same factor in all plans. Counted are the kernels of the model
    (`step_kernels`), the update, and what stages 2 and 3 exchange beyond stages 0 and 1, which are taken as
    equally fast. The times depend on nothing but the arguments, so all ranks find the same.
    """

    memory: MemoryModel
    """Whose model, ranks, precision, kind of device and compilation these are."""
    clips: int
    """Of a rank in each optimiser step."""
    fp8: bool = False
    """Whether the blocks' linear layers have products in FP8."""
    device: Device | None = None
    """What to calculate with; None is by the kind of device and the precision."""

    def seconds_per_clip(self, zero_stage: int, micro_batch: int, recomputed_blocks: int) -> float:
        """Of forward, backward and the clip's share of the update."""
        return self.seconds(zero_stage, micro_batch, recomputed_blocks) / micro_batch

    def seconds(self, zero_stage: int, micro_batch: int, recomputed_blocks: int) -> float:
        """Of one micro-batch, with its share of the update."""
        device, memory = self._device, self.memory
        busy = self._sum(recomputed_blocks, lambda kernels: kernels.seconds(device, micro_batch))
        count = self._sum(recomputed_blocks, lambda kernels: len(kernels.work))
        accumulation = max(1, self.clips // micro_batch)
        update = device.seconds(update_kernel(memory.trained // memory.ranks, self._dtype.itemsize))
        own = max(busy, device.launch * count)
        return own + update / accumulation + self._exchange(zero_stage, accumulation)

    def _exchange(self, zero_stage: int, accumulation: int) -> float:
        """Seconds that a micro-batch exchanges longer than at stages 0 and 1."""
        memory, element = self.memory, self._dtype.itemsize
        sent = 0.0
        if zero_stage >= 2:  # gradients after each micro-batch, not once for all
            sent += element * memory.trained * (1 - 1 / accumulation)
        if zero_stage == 3:  # weights before forward and backward
            sent += 2 * element * memory.parameters
        return sent * (1 - 1 / memory.ranks) / _EXCHANGE[memory.kind]

    def _sum(self, recomputed: int, of: "Callable[[_Kernels], float]") -> float:
        """A total over the kernels of a step with so many recomputed blocks.

        Blocks of one kind cost the same, but for the first, which drops no path. So two blocks alone give
        what one more recomputed block adds, and a third what a block after recomputed ones adds.
        """
        config = self.memory.config
        total = of(self._whole)
        if recomputed == 0 or config.frozen_backbone:
            return total

        def alone(count: int, again: int, has_local: bool) -> float:
            return of(self._blocks_alone(count, again, has_local=has_local))

        def later(has_local: bool) -> float:
            """What a block adds that computes the inputs of its linear layers again, as one before is
            recomputed."""
            if self.memory.compiled or self._on_cpu:  # where no block does, or all do
                return 0.0
            first = alone(2, 1, has_local) - alone(2, 0, has_local)
            return alone(3, 1, has_local) - alone(3, 0, has_local) - first

        is_local = config.has_local(0)
        total += alone(2, 1, is_local) - alone(2, 0, is_local) - later(is_local)
        kinds = [config.has_local(layer) for layer in range(1, config.depth)]
        for kind in set(kinds):
            total += kinds.count(kind) * later(kind)
        kinds = kinds[: recomputed - 1]
        for kind in set(kinds):
            total += kinds.count(kind) * (alone(2, 2, kind) - alone(2, 1, kind))
        return total

    @property
    def _dtype(self) -> torch.dtype:
        """Of tokens and products. Autocast, whose tokens are float32, is compared by the kernels of bf16."""
        return torch.float32 if self.memory.precision == "fp32" else torch.bfloat16

    @property
    def _device(self) -> Device:
        if self.device is not None:
            return self.device
        if self._on_cpu:
            return _CPU
        return replace(_H100, flops=_FP32_FLOPS) if self.memory.precision == "fp32" else _H100

    @property
    def _whole(self) -> "_Kernels":
        """The kernels of a step without recomputation."""
        return self._record(replace(self.memory.config, recomputed_blocks=0))

    def _blocks_alone(self, count: int, recomputed: int, *, has_local: bool) -> "_Kernels":
        """Those of a model of so many blocks of this kind, without global blocks."""
        config = self.memory.config
        changed: dict[str, Any] = {"local_layers": None, "global_layers": (), "output": "auto"}
        if not has_local:
            changed |= {"local_mhra": 0, "local_dpe": False}
            if config.temporal_module not in OUTSIDE_BLOCKS:
                changed["temporal_module"] = "none"
        return self._record(replace(config, depth=count, recomputed_blocks=recomputed, **changed))

    @property
    def _on_cpu(self) -> bool:
        return self.memory.kind == "cpu"

    def _record(self, config: UniFormerV2Config) -> "_Kernels":
        return _record(config, self._dtype, self.memory.compiled, self.fp8, self._on_cpu)


def describe_device(memory: MemoryModel) -> str:
    """The device that the times are of, and whether the model is compiled."""
    device = "two CPU cores" if memory.kind == "cpu" else "an H100"
    return f"{device}, {'compiled' if memory.compiled else 'not compiled'}"


@dataclass(frozen=True, eq=False)
class _Kernels:
    """The kernels of a micro-batch of any size. Hashed by identity."""

    work: tuple[tuple[bool, int, int, int, int], ...]
    """Of each: whether it is a product in FP8; its FLOPs, those of each clip, its bytes, those of each
    clip."""

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> "_Kernels":
        """kernels: of `ANY_BATCH` clips."""
        work = []
        for kernel in kernels:
            sizes = [*kernel.read.values(), *kernel.written.values()]
            each = sum(size for size in sizes if size % _PRIME == 0) // ANY_BATCH
            fixed = sum(size for size in sizes if size % _PRIME)
            flops, more = (kernel.flops, 0) if kernel.flops % _PRIME else (0, kernel.flops // ANY_BATCH)
            work.append((kernel.kind == FP8_PRODUCTS, flops, more, fixed, each))
        return cls(tuple(work))

    @lru_cache(maxsize=4096)  # noqa: B019 -- `_record` keeps at most 64 of them
    def seconds(self, device: Device, clips: int) -> float:
        return sum(
            max(
                (flops + clips * more) / (device.fp8 if is_fp8 else device.flops),
                (fixed + clips * each) / device.bandwidth,
                device.least,
            )
            for is_fp8, flops, more, fixed, each in self.work
        )


@lru_cache(maxsize=64)
def _record(
    config: UniFormerV2Config, dtype: torch.dtype, compiled: bool, fp8: bool, on_cpu: bool
) -> _Kernels:
    step = record_step(config, ANY_BATCH, dtype=dtype, compiled=compiled, fp8=fp8, on_cpu=on_cpu)
    return _Kernels.of(step.kernels)
