"""What all ranks say of a step, added up: one small all-reduce, read one step later.

Reading late keeps a GPU from waiting: the numbers of step k are fetched when step k + 1 is on its way. All
ranks read the same sums at the same step, so they agree on what follows from them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.async_copy import AsyncCopy
from trainer.distributed.batch_hash import format_hash, split_halves


class StepSums(NamedTuple):
    """Of one rank's micro-batches in a step, on the device.

    loss: sum of the losses of the clips that counted. batch_hash: sum of `hash_clips`, int64.
    """

    loss: Tensor
    batch_hash: Tensor


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks. step: counted from 0. loss: mean over the clips that counted, NaN without any.
    batch_hash: of all clips, 16 hexadecimal digits (see `hash_clips`).

    clips: that were to be seen; bad: of those, the ones that could not be read; defects: videos found bad for
    the first time. leaving: ranks that were asked to leave. wants_save: whether rank 0 finds a save due.
    saves_finished, saves_failed: checkpoints that each rank has written, or failed to, since the start.
    """

    step: int
    loss: float
    batch_hash: str
    clips: int
    bad: int
    bad_samples: int
    leaving: int
    wants_save: bool
    saves_finished: int
    saves_failed: int


class StepSync:
    """Adds up one step after another; every method is collective."""

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
        leaving: bool,
        wants_save: bool,
        saves: tuple[int, int],
    ) -> StepTotals | None:
        """Hand in this rank's part of `step`; get the totals of the step handed in before, None at first.

        saves: finished, failed.
        """
        numbers = [clips - bad, clips, bad, bad_samples, leaving, wants_save, *saves]
        part = torch.tensor([0.0, 0.0, 0.0, *numbers], dtype=torch.float64)
        if self._device.type == "cuda":  # from memory that is not pinned, the copy would wait
            part = part.pin_memory()
        part = part.to(self._device, non_blocking=True)
        part[0] = sums.loss.double()
        part[1:3] = split_halves(sums.batch_hash)
        before = self.last()
        dist.all_reduce(part)
        self._pending = (step, AsyncCopy(part))
        return before

    def last(self) -> StepTotals | None:
        """The totals of the step handed in last, once."""
        if self._pending is None:
            return None
        step, sums = self._pending
        self._pending = None
        loss, upper, lower, counted, *counts = sums.values().tolist()
        clips, bad, bad_samples, leaving, wants_save, finished, failed = counts
        return StepTotals(
            step,
            loss / counted if counted else float("nan"),
            format_hash(upper, lower),
            int(clips),
            int(bad),
            int(bad_samples),
            int(leaving),
            wants_save > 0,
            int(finished),
            int(failed),
        )
