"""Estimates the peak memory of a rank in bytes, and finds how much it has."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models import UniFormerV2Config
from models.cost import (
    activation_bytes,
    backward_bytes,
    clips_per_forward,
    inference_bytes,
    parameter_count,
    trainable_parameter_count,
)
from pipelines.autotune import AHEAD, MOST_AHEAD
from pipelines.dali.buffers import MOST
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment
from trainer.errors import RunError
from trainer.system.device import Precision

GIB = 2**30
REDUCE_BUCKET = 500_000_000  # elements of DeepSpeed's buffer for the all-reduce of gradients
GATHERED = 1_000_000_000  # weights that ZeRO 3 keeps gathered at a time: all of any model here
RESERVE = {"cuda": 3 * GIB, "cpu": 2 * GIB}
"""Bytes in reserve by kind of device: on a GPU for NCCL, the libraries' workspaces, DALI's buffers and its up
to a hundred idle video decoders; on a CPU for the workers. Assumed, not measured."""
FRAGMENTATION = 0.06  # of the estimate, lost by the allocator between the tensors
SUSPECT_BATCHES = 2  # micro-batches kept to find the cause of a nonfinite step, which the next step reveals
UNLIMITED = 2**60  # a control group of version 1 without a limit names a number above this


@dataclass(frozen=True)
class AvailableMemory:
    """What every rank has at least."""

    kind: str
    """Of device, "cuda" or "cpu"."""
    bytes: int
    """Free on the GPU, or this rank's share of the machine's memory."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at its peak."""

    weights: int
    """All of them, or this rank's part."""
    gradients: int
    """Accumulated."""
    optimiser: int
    """Moments, and the master weights."""
    ema: int
    clips: int
    """Batches prefetched, made by a thread, or kept for a nonfinite step."""
    working: int
    """Activations and DeepSpeed's buffers, or the update, or an evaluation, whichever needs most."""
    reserve: int
    """For what is not counted."""

    @property
    def states(self) -> int:
        """What is held for the whole run."""
        return self.weights + self.gradients + self.optimiser + self.ema

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryModel:
    """Estimates the memory of a rank of one training, for any batch plan.

    Derived from DeepSpeed 0.19.8, and within 5% of the peak of its CPU tensors in models of 3 to 7 million
    weights, in fp32 and under autocast: all stages with one rank, and 0 to 2 with two, where stage 3 is up to
    8% too high. Without accumulation it is too high by up to the gradients, which exist only when the
    activations are freed. On GPUs it has not been measured.
    """

    config: UniFormerV2Config
    ranks: int
    precision: Precision
    kind: str
    """Of device, "cuda" or "cpu"."""
    fused: bool
    """Whether the update is one kernel."""
    compiled: bool
    """Whether the model is compiled."""
    ema: bool
    """Whether the run keeps an EMA of the weights."""
    prefetch: int | None
    """Batches prefetched; None where the loader chooses."""
    views: int
    """Of an evaluation batch."""

    @classmethod
    def of(
        cls, recipe: Recipe, config: UniFormerV2Config, *, ranks: int, precision: Precision, kind: str
    ) -> "MemoryModel":
        fused, prefetch, evaluation = recipe.engine.fused, recipe.data.prefetch, recipe.evaluation
        return cls(
            config=config,
            ranks=ranks,
            precision=precision,
            kind=kind,
            fused=fused is not False,
            compiled=recipe.engine.compile,
            ema=recipe.optimisation.ema_decay is not None,
            prefetch=None if prefetch == "auto" else prefetch,
            views=evaluation.batch * evaluation.clips * evaluation.crops,
        )

    @cached_property
    def trained(self) -> int:
        """Trained weights."""
        return trainable_parameter_count(self.config)

    @cached_property
    def parameters(self) -> int:
        """All weights."""
        return parameter_count(self.config)

    def estimate(self, *, zero_stage: int, micro_batch: int, recomputed_blocks: int) -> MemoryEstimate:
        """With this ZeRO stage, so many clips per forward pass, so many recomputed blocks."""
        bf16, trained = self.precision == "bf16", self.trained
        parts = self.ranks if zero_stage >= 1 else 1
        weights = self.parameters * (2 if bf16 else 4) // (self.ranks if zero_stage == 3 else 1)
        # ZeRO flattens the weights and keeps a master copy of the rank's part, even of weights in fp32.
        optimiser = trained * (12 if bf16 or zero_stage >= 1 else 8) // parts
        # In bf16 each gradient exists twice: that of the last backward, and the sum in fp32.
        whole = trained * (6 if bf16 else 4)
        gradients = 4 * trained // self.ranks if zero_stage >= 2 else whole
        clips = self._prefetched(micro_batch) + self._prefetched(self.views)
        # On a CPU a thread of the training loader holds one more, see `MadeAhead`.
        clips += (SUSPECT_BATCHES + (self.kind == "cpu")) * self._batch_bytes(micro_batch)
        buffers = self._buffers(zero_stage)
        lasting = buffers if zero_stage == 3 else 0  # other stages free them after each backward
        # The gradients flattened, for the all-reduce or the update; several kernels take two more copies,
        # when ZeRO 1 and 2 have freed the gradients that were flattened.
        update = 4 * trained // parts
        if not self.fused and zero_stage >= 1:
            freed = gradients if zero_stage <= 2 and not bf16 else 0
            update = max(update, 12 * trained // parts - freed)
        if bf16 and zero_stage <= 1:
            update = max(update, 6 * min(trained, REDUCE_BUCKET))
        # At the end of the backward ZeRO 3 holds the gradients of a bucket twice, the second time flattened.
        # The buffers of several ranks include that.
        is_alone = zero_stage == 3 and self.ranks == 1
        flattened = 2 * (2 if bf16 else 4) * min(trained, REDUCE_BUCKET) if is_alone else 0
        ema = 4 * trained // parts if self.ema else 0
        working = max(
            buffers + self._activations(micro_batch, recomputed_blocks),
            lasting + max(update, flattened),
            lasting + ema + self._inference(min(self.views, self._views_at_once)),
        )
        counted = weights + gradients + optimiser + ema + clips + working
        reserve = RESERVE[self.kind] + int(FRAGMENTATION * counted)
        return MemoryEstimate(weights, gradients, optimiser, ema, clips, working, reserve)

    def _buffers(self, zero_stage: int) -> int:
        """Bytes of DeepSpeed's communication buffers during a backward."""
        # On a CPU only the part of a buffer that is written takes memory.
        bucket = REDUCE_BUCKET if self.kind == "cuda" else min(REDUCE_BUCKET, self.trained)
        if zero_stage == 0 or (zero_stage == 1 and self.precision == "bf16"):
            return 0
        if zero_stage <= 2:  # autocast has a bucket for each of its two types, and both hold fp32
            return bucket * {"fp32": 4, "autocast": 8, "bf16": 2}[self.precision]
        buffers = bucket * {"fp32": 4, "autocast": 6, "bf16": 2}[self.precision]
        if self.ranks > 1:  # gradients are flattened before they are scattered; weights stay gathered
            buffers = 2 * buffers + min(self.parameters, GATHERED) * (2 if self.precision == "bf16" else 4)
        return buffers

    def _activations(self, micro_batch: int, recomputed_blocks: int) -> int:
        options: Any = {
            "batch": micro_batch,
            "bytes_per_element": self._element,
            "autocast": self.precision == "autocast",
            "recomputed_blocks": recomputed_blocks,
            "on_cpu": self.kind == "cpu",
            "compiled": self.compiled,
        }
        working = activation_bytes(self.config, **options) + backward_bytes(self.config, **options)
        return max(working, self._inference(micro_batch))

    def _inference(self, clips: int) -> int:
        autocast = self.precision == "autocast"
        return inference_bytes(self.config, batch=clips, bytes_per_element=self._element, autocast=autocast)

    @property
    def _views_at_once(self) -> int:
        """Of a forward pass of the evaluation."""
        return clips_per_forward(self.config, on_cpu=self.kind == "cpu", bytes_per_element=self._element)

    @property
    def _element(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def _batch_bytes(self, clips: int) -> int:
        return clips * 3 * self.config.frames * self.config.resolution**2 * 4

    def _prefetched(self, clips: int) -> int:
        """Bytes of a loader's prefetched batches of so many clips, in fp32, and of those in use."""
        batch = self._batch_bytes(clips)
        used = batch * (1 + MOST if self.kind == "cuda" else 1)
        if self.prefetch is not None:
            return self.prefetch * batch + used
        return max(2 * batch, min(MOST_AHEAD * batch, AHEAD)) + used


def find_available_memory(environment: Environment) -> AvailableMemory:
    """The memory of the rank that has least. Collective, after `connect`. Raises RunError as `free_bytes`."""
    device = environment.device
    least = torch.tensor(free_bytes(device, environment.local_world_size), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return AvailableMemory(device.type, int(least))


def free_bytes(device: torch.device, local_world_size: int, root: Path = Path("/")) -> int:
    """Bytes that one rank may still allocate: free on its GPU, or its share of the machine's memory.

    A container or a batch system may limit a job to less than the machine has: control groups of both
    versions are read, with all those above them. root: where /proc and /sys are.

    Raises RunError where /proc/meminfo cannot be read.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        (available,) = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError) as error:
        raise RunError(
            f"how much memory this machine has cannot be read from /proc/meminfo ({error}); set "
            "engine.micro_batch, engine.zero_stage and engine.recomputed_blocks instead of auto"
        ) from error
    return min([1024 * available, *_left_in_groups(root)]) // local_world_size


def _left_in_groups(root: Path) -> list[int]:
    """Bytes left in each control group of this process that limits memory."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's: then only the mount itself is there.
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount) and (found := _left(folder, *names)) is not None:
                left.append(found)
    return left


def _left(folder: Path, limit_name: str, usage_name: str, cached_name: str) -> int | None:
    """Bytes left in one control group, cached files counted as free; None where it has no limit."""
    try:
        limit = (folder / limit_name).read_text(encoding="ascii").strip()
        used = int((folder / usage_name).read_text(encoding="ascii"))
        counts = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # the root group has no such files
        return None
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    cached = sum(int(line.split()[1]) for line in counts if line.split()[0] == cached_name)
    return max(0, int(limit) - used + cached)
