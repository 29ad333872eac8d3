"""One small all-reduce after each step, whose totals are read one step later.

The host reads the totals of step k while the device computes step k + 1, so the device does not wait. All
ranks read the same totals at the same step and so make the same decisions.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.batch_hash import format_hash, split_halves
from trainer.distributed.async_copy import AsyncCopy


class StepSums(NamedTuple):
    """Sums over one rank's micro-batches of a step, on the device."""

    loss: Tensor
    """Sum of the losses of the clips that could be read."""
    batch_hash: Tensor
    """Sum of `ClipBatch.hash`, int64."""


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks."""

    step: int
    """Counted from 0."""
    loss: float
    """Mean over the clips that could be read; NaN without any."""
    batch_hash: str
    """Of all clips, 16 hexadecimal digits, see `hash_clips`."""
    clips: int
    """Clips of the step."""
    bad: int
    """Of these clips, those that could not be read."""
    bad_samples: int
    """Bad samples found for the first time."""
    stop_requests: int
    """Ranks that were asked to stop."""
    save_due: bool
    """Whether rank 0 finds a save due."""
    writing: int
    """Ranks that are still writing their shard of a checkpoint."""


class StepSync:
    """Adds up the numbers of one step after another. Every method is collective."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: tuple[int, AsyncCopy] | None = None

    def exchange(
        self,
        step: int,
        sums: StepSums,
        *,
        clips: int,
        bad: int,
        bad_samples: int,
        stop_requested: bool,
        save_due: bool,
        writing: bool,
    ) -> StepTotals | None:
        """Start the all-reduce of `step`. Returns the totals of the step before; None after the first."""
        numbers = [clips - bad, clips, bad, bad_samples, stop_requested, save_due, writing]
        part = torch.tensor([0.0, 0.0, 0.0, *numbers], dtype=torch.float64)
        if self._device.type == "cuda":  # a copy from pageable memory would block the host
            part = part.pin_memory()
        part = part.to(self._device, non_blocking=True)
        part[0] = sums.loss.double()
        part[1:3] = split_halves(sums.batch_hash)
        before = self.read_pending()
        dist.all_reduce(part)
        self._pending = (step, AsyncCopy(part))
        return before

    def read_pending(self) -> StepTotals | None:
        """The totals of the latest step; None where they were read already."""
        if self._pending is None:
            return None
        step, sums = self._pending
        self._pending = None
        loss, upper, lower, counted, *counts = sums.values().tolist()
        clips, bad, bad_samples, stop_requests, save_due, writing = map(int, counts)
        return StepTotals(
            step=step,
            loss=loss / counted if counted else float("nan"),
            batch_hash=format_hash(upper, lower),
            clips=clips,
            bad=bad,
            bad_samples=bad_samples,
            stop_requests=stop_requests,
            save_due=save_due > 0,
            writing=writing,
        )
