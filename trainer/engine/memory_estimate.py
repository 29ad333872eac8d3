"""How many bytes a rank needs at its fullest, and how many it has."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from models import UniFormerV2Config
from models.cost import (
    activation_bytes,
    backward_bytes,
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
REDUCE_BUCKET = 500_000_000  # elements that DeepSpeed sets aside for adding up gradients over the ranks
GATHERED = 1_000_000_000  # weights that ZeRO 3 keeps whole at a time: all of any model here
RESERVE = {"cuda": 3 * GIB, "cpu": 2 * GIB}
"""Bytes set aside by kind of device: on a GPU for NCCL, the libraries' workspaces, DALI's buffers and up to a
hundred idle video decoders that it keeps, on a CPU for the processes that read and decode. Assumed, not
measured."""
FRAGMENTATION = 0.06  # of what is needed, lost by the allocator between the tensors
SUSPECT_BATCHES = (
    2  # micro-batches of clips that are kept for an inquiry: what came of a step is known in the next
)
UNLIMITED = 2**60  # a control group of version 1 without a limit names a number above this


@dataclass(frozen=True)
class AvailableMemory:
    """What every rank has at least.

    kind: of device, "cuda" or "cpu". bytes: free on the GPU, or this rank's share of the machine's memory.
    """

    kind: str
    bytes: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank at its fullest, by what takes them.

    weights: whole or this rank's part. gradients: accumulated. optimiser: moments, and the master weights.
    average: of the weights. clips: batches made ahead, and those kept for an inquiry. working: activations
    and DeepSpeed's buffers, or what an update or an evaluation takes, whichever is most. reserve: for what is
    not counted.
    """

    weights: int
    gradients: int
    optimiser: int
    average: int
    clips: int
    working: int
    reserve: int

    @property
    def states(self) -> int:
        """What stays for the whole run."""
        return self.weights + self.gradients + self.optimiser + self.average

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class MemoryModel:
    """What a rank of this training needs, for any layout: `estimate`.

    Read off DeepSpeed 0.19.8, and within 5% of what its CPU tensors take at their fullest in models of
    3 to 7 million weights, in fp32 and under autocast: all stages with one rank, and 0 to 2 with two, where
    stage 3 is up to 8% too high. Without accumulation it is too high by up to the gradients, which are there
    only when the activations have gone. On GPUs it has not been measured.

    ranks: in all. precision: of the products. kind: of device, "cuda" or "cpu". fused: whether the update is
    one kernel. average: whether one of the weights is kept. prefetch: batches made ahead; None is for the
    loader to choose. views: clips of an evaluation batch.
    """

    config: UniFormerV2Config
    ranks: int
    precision: Precision
    kind: str
    fused: bool
    average: bool
    prefetch: int | None
    views: int

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
            fused=kind == "cuda" if fused == "auto" else fused,
            average=recipe.optimisation.ema_decay is not None,
            prefetch=None if prefetch == "auto" else prefetch,
            views=evaluation.batch * evaluation.clips * evaluation.crops,
        )

    @cached_property
    def trained(self) -> int:
        """Weights that are trained."""
        return trainable_parameter_count(self.config)

    @cached_property
    def parameters(self) -> int:
        """All weights."""
        return parameter_count(self.config)

    def estimate(self, *, zero_stage: int, micro_batch: int, recomputed_blocks: int) -> MemoryEstimate:
        """What a rank needs with this ZeRO stage, so many clips a forward pass, so many blocks recomputed."""
        bf16, trained = self.precision == "bf16", self.trained
        parts = self.ranks if zero_stage >= 1 else 1
        weights = self.parameters * (2 if bf16 else 4) // (self.ranks if zero_stage == 3 else 1)
        # Stages flatten the weights and keep a master copy of their part, even of weights in fp32.
        optimiser = trained * (12 if bf16 or zero_stage >= 1 else 8) // parts
        # In bf16 each gradient is there twice: as it came, and accumulated in fp32.
        whole = trained * (6 if bf16 else 4)
        gradients = 4 * trained // self.ranks if zero_stage >= 2 else whole
        clips = self._made_ahead(micro_batch) + self._made_ahead(self.views)
        clips += SUSPECT_BATCHES * self._batch_bytes(micro_batch)
        buffers = self._buffers(zero_stage)
        lasting = buffers if zero_stage == 3 else 0  # the other stages give them back after each backward
        # The gradients flattened, to be added up or updated with; several kernels take two more such copies.
        of_update = 4 * trained // parts + (0 if self.fused or zero_stage == 0 else 8 * trained // parts)
        if bf16 and zero_stage <= 1:
            of_update = max(of_update, 6 * min(trained, REDUCE_BUCKET))
        average = 4 * trained // parts if self.average else 0
        working = max(
            buffers + self._activations(micro_batch, recomputed_blocks),
            lasting + of_update,
            lasting + average + self._inference(self.views),
        )
        counted = weights + gradients + optimiser + average + clips + working
        reserve = RESERVE[self.kind] + int(FRAGMENTATION * counted)
        return MemoryEstimate(weights, gradients, optimiser, average, clips, working, reserve)

    def _buffers(self, zero_stage: int) -> int:
        """Bytes that DeepSpeed's communication takes during a backward."""
        # On a CPU only the touched part of a buffer takes memory.
        bucket = REDUCE_BUCKET if self.kind == "cuda" else min(REDUCE_BUCKET, self.trained)
        if zero_stage == 0 or (zero_stage == 1 and self.precision == "bf16"):
            return 0
        if zero_stage <= 2:  # autocast has a bucket for each of its two types, and both hold fp32
            return bucket * {"fp32": 4, "autocast": 8, "bf16": 2}[self.precision]
        buffers = bucket * {"fp32": 4, "autocast": 6, "bf16": 2}[self.precision]
        if self.ranks > 1:  # what is scattered is flattened first; the weights are gathered, and stay so
            buffers = 2 * buffers + min(self.parameters, GATHERED) * (2 if self.precision == "bf16" else 4)
        return buffers

    def _activations(self, micro_batch: int, recomputed_blocks: int) -> int:
        kept = activation_bytes(
            self.config,
            batch=micro_batch,
            bytes_per_element=self._element,
            autocast=self.precision == "autocast",
            recomputed_blocks=recomputed_blocks,
        )
        passing = backward_bytes(
            self.config,
            batch=micro_batch,
            bytes_per_element=self._element,
            autocast=self.precision == "autocast",
        )
        return max(kept + passing, self._inference(micro_batch))

    def _inference(self, clips: int) -> int:
        return inference_bytes(
            self.config,
            batch=clips,
            bytes_per_element=self._element,
            autocast=self.precision == "autocast",
        )

    @property
    def _element(self) -> int:
        return 4 if self.precision == "fp32" else 2

    def _batch_bytes(self, clips: int) -> int:
        return clips * 3 * self.config.frames * self.config.resolution**2 * 4

    def _made_ahead(self, clips: int) -> int:
        """Bytes of the batches of so many clips that a loader makes ahead, in fp32, and of those in use."""
        batch = self._batch_bytes(clips)
        used = batch * (1 + MOST if self.kind == "cuda" else 1)
        if self.prefetch is not None:
            return self.prefetch * batch + used
        return max(2 * batch, min(MOST_AHEAD * batch, AHEAD)) + used


def find_available_memory(environment: Environment) -> AvailableMemory:
    """What every rank has at least, the same on all ranks. Collective, after `connect`.

    Raises RunError where it cannot be found out.
    """
    device = environment.device
    least = torch.tensor(free_bytes(device, environment.local_world_size), device=device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return AvailableMemory(device.type, int(least))


def free_bytes(device: torch.device, local_world_size: int, root: Path = Path("/")) -> int:
    """Bytes that one rank may still take: what is free on its GPU, or its share of the machine's memory.

    A container or a batch system may give a job less than the machine has: control groups of both versions
    are looked at, with all those above them. root: where /proc and /sys are.

    Raises RunError where /proc does not say.
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
    """Bytes left in each control group of this process that limits memory; none where none does."""
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
