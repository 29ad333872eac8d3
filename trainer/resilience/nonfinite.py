"""Nonfinite steps: the diagnosis of their cause, files for a replay, and their number in a run."""

import logging
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.augment.mixing import MixedLabels
from pipelines.loader import ClipBatch
from trainer.checkpoint.retention import MARGIN
from trainer.checkpoint.weights import save_weights
from trainer.distributed.collectives import find_first, gather
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import SUSPECT_BATCHES
from trainer.engine.state_shards import owned_shards
from trainer.errors import RunError
from trainer.loss import masked_cross_entropy
from trainer.resilience.nan_replay import WEIGHTS, BatchOrigin, write_replay_file
from trainer.resilience.nan_tracer import trace_nonfinite

KEPT = 3  # steps with replay files; more would only fill the disk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NonfiniteReport:
    """The cause of a nonfinite step."""

    reason: str
    """The value that is not finite and its module; follows "because"."""
    file: Path | None
    """The replay file; None where none was written."""


class _HeldBatch:
    """A copy of a step's first micro-batch with a loss that is not finite, else of its last.

    The device selects it, without a host wait. number: of the micro-batch, from 0.
    """

    def __init__(self, step: int, batch: ClipBatch, loss: Tensor) -> None:
        self.step = step
        clips, labels, ids, valid, keys, *mixed = (tensor.clone() for tensor in _tensors(batch))
        self.batch = ClipBatch(clips, labels, ids, valid, keys, MixedLabels(*mixed) if mixed else None)
        self.number = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._finite = loss.detach().isfinite()

    def add(self, number: int, batch: ClipBatch, loss: Tensor) -> None:
        for held, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            torch.where(self._finite, new, held, out=held)
        self.number = torch.where(self._finite, number, self.number)
        self._finite = self._finite & loss.detach().isfinite()


def _tensors(batch: ClipBatch) -> tuple[Tensor, ...]:
    mixed = () if batch.mixed is None else (batch.mixed.labels, batch.mixed.weights)
    return batch.clips, batch.labels, batch.ids, batch.valid, batch.keys, *mixed


@dataclass
class NonfiniteDiagnosis:
    """Holds a micro-batch of each of the last two steps, and finds the cause of a nonfinite step."""

    engine: Engine
    run_dir: Path
    description: dict[str, Any]
    """Metadata of the weights, see `TrainState`."""
    path_of: Callable[[int], Path]
    """A sample's file."""
    label_smoothing: float = 0.0
    """Of the loss."""

    def __post_init__(self) -> None:
        self._folder = self.run_dir / "not-finite"
        self._held: deque[_HeldBatch] = deque()
        self._kept = 0

    def hold(self, step: int, number: int, batch: ClipBatch, loss: Tensor) -> None:
        """Add a micro-batch of the present step, `number` counted from 0, and its loss.

        One is held per step: the first with a loss that is not finite, else the last.
        """
        if number == 0:
            if len(self._held) == SUSPECT_BATCHES:
                self._held.popleft()  # frees memory for the next
            self._held.append(_HeldBatch(step, batch, loss))
        else:
            self._held[-1].add(number, batch, loss)

    def diagnose(self, step: int) -> NonfiniteReport:
        """Find the cause among the held batches of all ranks, and write replay files. Collective."""
        held = next(held for held in self._held if held.step == step)
        number, batch = int(held.number), held.batch
        origin, had_memory = None, True
        try:
            origin = trace_nonfinite(self.engine.model, lambda: self._loss(batch)).origin
        except torch.OutOfMemoryError:  # the gradients of the next step need memory too
            had_memory = False
        own = None if origin is None else (origin.order, origin.description, batch.ids.tolist())
        gathered = gather((own, had_memory))
        origins = {rank: found for rank, (found, _) in enumerate(gathered) if found is not None}
        if not origins:
            reason = "there was not enough memory to find the cause"
            if all(had_memory for _, had_memory in gathered):
                reason = (
                    f"the clips of the last micro-batch ({self.engine.accumulation} make a step) give "
                    "finite values in a second pass"
                )
            return NonfiniteReport(f"the gradient is not finite; {reason}", None)
        first, words, samples = min(origins.values(), key=lambda found: found[0])
        causing = [rank for rank, found in origins.items() if found[0] == first]
        file, lost = self._keep(step, number, batch, words, causing)
        ranks = ", ".join(map(str, causing))
        listed = ", ".join(map(str, samples))
        return NonfiniteReport(f"{words} (rank {ranks}, samples {listed}{lost})", file)

    def _loss(self, batch: ClipBatch) -> Tensor:
        logits = self.engine.forward_outside_step(batch.clips, batch.keys)
        losses = masked_cross_entropy(logits, batch.labels, batch.valid, batch.mixed, self.label_smoothing)
        # At stage 3 weights are gathered only while their module runs: the backward pass is not traced.
        return losses.mean() if self.engine.zero_stage < 3 else losses.mean().detach()

    def _keep(
        self, step: int, number: int, batch: ClipBatch, words: str, causing: list[int]
    ) -> tuple[Path | None, str]:
        """Write the clips of these ranks and, on rank 0, the weights; all of them or nothing. Collective.

        Returns the first file, and a remark for the message if nothing was written.
        """
        if self._kept == KEPT:
            return None, ""
        folder, rank = self._folder / f"step-{step + 1:07d}", dist.get_rank()
        weights = self.engine.gather_weights()
        paths = [str(self.path_of(sample)) if sample >= 0 else "" for sample in batch.ids.tolist()]
        about = BatchOrigin(step + 1, rank, number, self.engine.precision, words, paths, self.label_smoothing)
        problem = self._lack_of_space(weights, batch, len(causing))
        if problem is None:
            try:
                if rank in causing:
                    write_replay_file(folder / _name(rank), batch, about)
                if rank == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    save_weights(folder / WEIGHTS, weights, self.description)
            except (OSError, RunError) as error:
                problem = str(error)
            problem = find_first(problem)
            if problem is not None and rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        if problem is not None:
            if rank == 0:
                _log.warning("the clips of step %d cannot be kept: %s", step + 1, problem)
            return None, "; not kept for a replay"
        self._kept += 1
        return folder / _name(causing[0]), ""

    def _lack_of_space(self, weights: dict[str, Tensor], batch: ClipBatch, causing: int) -> str | None:
        """Why the replay files and the next checkpoint do not fit on disk, or None. Collective."""
        pieces = owned_shards(self.engine.state_shards(), dist.get_rank(), dist.get_world_size())
        checkpoint = torch.tensor(sum(piece.values.nbytes for piece in pieces), device=self.engine.device)
        dist.all_reduce(checkpoint)
        files_size = sum(tensor.nbytes for tensor in weights.values()) + 4 * causing * batch.clips.numel()
        problem = None
        if dist.get_rank() == 0:
            try:
                left = shutil.disk_usage(self._folder.parent).free - files_size
                if left < int(checkpoint) + MARGIN:
                    problem = f"{self._folder.parent} would have no space for the next checkpoint"
            except OSError as error:
                problem = str(error)
        return find_first(problem)


@dataclass
class SkippedSteps:
    """Counts the skipped steps in all attempts of a run.

    A step that is repeated and skipped again counts again: otherwise a job that is preempted often could
    repeat the same steps forever.
    """

    limit: int
    """Most skipped steps, the recipe's `optimisation.skipped_steps`."""
    count: int = 0
    """Skipped steps so far."""
    keep: Callable[[int], None] | None = None
    """Writes the count for the next attempt."""

    def add(self, step: int, reason: str) -> str:
        """Count a skipped step on every rank; returns a line for the log. Raises RunError above the limit.

        step: counted from 1. reason: follows "because", such as "the loss is nan".
        """
        self.count += 1
        if self.keep is not None:
            self.keep(self.count)
        allowed = f"at most {self.limit} such steps are allowed" if self.limit else "no such step is allowed"
        left_out = f"step {step} changed nothing, because {reason}"
        if self.count <= self.limit:
            return f"{left_out}; {self.count} of at most {self.limit} such steps in this run"
        raise RunError(
            f"{left_out}; in all starts of this run that makes {self.count}, and {allowed} "
            "(optimisation.skipped_steps). The run stops. Lower optimisation.learning_rate, set "
            "optimisation.clip_norm, or, where it is lower, raise engine.precision to fp32; or allow more "
            "such steps. not-finite/ of the run directory holds the clips of those steps: uniformerv2 train "
            "--replay FILE prints the first value that is not finite"
        )


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
