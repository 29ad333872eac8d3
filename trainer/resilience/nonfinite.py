"""After a step whose gradient was not finite: whose clips it was, which module, and the evidence for a
replay.
"""

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

from pipelines.loader import ClipBatch
from trainer.checkpoint.retention import MARGIN
from trainer.checkpoint.weights import save_weights
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import SUSPECT_BATCHES
from trainer.engine.state_shards import owned_shards
from trainer.errors import RunError
from trainer.loss import masked_cross_entropy
from trainer.resilience.nan_replay import WEIGHTS, write_replay_file
from trainer.resilience.nan_tracer import trace_nonfinite

KEPT = 3  # steps of which clips and weights are kept; more of them would say the same and fill the disk

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NonfiniteReport:
    """words: what was not finite where, to follow "because". file: for a replay; None where none was kept."""

    reason: str
    file: Path | None


class _Suspect:
    """Of a step's micro-batches a copy of the first whose loss is not finite, else of the last.

    The device chooses, so that the host need not wait for a loss. number: of the micro-batch, from 0.
    """

    def __init__(self, step: int, batch: ClipBatch, loss: Tensor) -> None:
        self.step = step
        self.batch = ClipBatch(*(tensor.clone() for tensor in _tensors(batch)))
        self.number = torch.zeros((), dtype=torch.int64, device=loss.device)
        self._finite = loss.detach().isfinite()

    def add(self, number: int, batch: ClipBatch, loss: Tensor) -> None:
        for held, new in zip(_tensors(self.batch), _tensors(batch), strict=True):
            torch.where(self._finite, new, held, out=held)
        self.number = torch.where(self._finite, number, self.number)
        self._finite = self._finite & loss.detach().isfinite()


def _tensors(batch: ClipBatch) -> tuple[Tensor, ...]:
    return batch.clips, batch.labels, batch.ids, batch.valid, batch.keys


class NonfiniteDiagnosis:
    """Holds the suspects of the last two steps, and looks into those of one that went wrong.

    folder: of the run. description: what is needed to use the weights, see `TrainState`. path_of: a sample's
    file.
    """

    def __init__(
        self, engine: Engine, folder: Path, description: dict[str, Any], path_of: Callable[[int], Path]
    ) -> None:
        self._engine = engine
        self._folder = folder / "not-finite"
        self._description = description
        self._path_of = path_of
        self._suspects: deque[_Suspect] = deque()
        self._kept = 0

    def hold(self, step: int, number: int, batch: ClipBatch, loss: Tensor) -> None:
        """Remember a micro-batch of the step at work, `number` counted from 0, and its loss.

        What is held is the first one whose loss was not finite, else the last: one, however many a step has.
        """
        if number == 0:
            if len(self._suspects) == SUSPECT_BATCHES:
                self._suspects.popleft()  # before its successor takes memory
            self._suspects.append(_Suspect(step, batch, loss))
        else:
            self._suspects[-1].add(number, batch, loss)

    def diagnose(self, step: int) -> NonfiniteReport:
        """Find the culprit among all ranks' suspects, and keep its clips and the weights. Collective."""
        suspect = next(suspect for suspect in self._suspects if suspect.step == step)
        number, batch = int(suspect.number), suspect.batch
        buffers = [(buffer, buffer.clone()) for buffer in self._engine.model.buffers()]
        origin, room = None, True
        try:
            origin = trace_nonfinite(self._engine.model, lambda: self._loss(batch)).origin
        except torch.OutOfMemoryError:  # the gradients of the next step are there, too
            room = False
        for buffer, before in buffers:
            buffer.copy_(before)
        told: list[Any] = [None] * dist.get_world_size()
        own = None if origin is None else (origin.order, origin.description, batch.ids.tolist())
        dist.all_gather_object(told, (own, room))
        orders = [order for order, _ in told]
        culprits = [rank for rank, order in enumerate(orders) if order is not None]
        if not culprits and not all(looked for _, looked in told):
            return NonfiniteReport(
                "the gradient is not finite; there was not enough memory to look for where", None
            )
        if not culprits:
            return NonfiniteReport(
                "the gradient is not finite; the clips of the last micro-batch "
                f"({self._engine.accumulation} make a step), seen once more, give finite numbers",
                None,
            )
        first = min(orders[rank][0] for rank in culprits)
        culprits = [rank for rank in culprits if orders[rank][0] == first]
        _, words, samples = orders[culprits[0]]
        file, lost = self._keep(step, number, batch, words, culprits)
        ranks = ", ".join(map(str, culprits))
        listed = ", ".join(map(str, samples))
        return NonfiniteReport(f"{words} (rank {ranks}, samples {listed}{lost})", file)

    def _loss(self, batch: ClipBatch) -> Tensor:
        logits = self._engine.forward_outside_step(batch.clips, batch.keys)
        losses = masked_cross_entropy(logits, batch.labels, batch.valid)
        # Stage 3 has the weights only while their module runs: its backward is not looked into.
        return losses.mean() if self._engine.zero_stage < 3 else losses.mean().detach()

    def _keep(
        self, step: int, number: int, batch: ClipBatch, words: str, culprits: list[int]
    ) -> tuple[Path | None, str]:
        """Keep the culprits' clips, and on rank 0 the weights; all of it or nothing. Collective.

        Returns the first culprit's file, and what to say where nothing was kept.
        """
        if self._kept == KEPT:
            return None, ""
        folder, rank = self._folder / f"step-{step + 1:07d}", dist.get_rank()
        weights = self._engine.gather_weights()
        about = {
            "step": step + 1,
            "rank": rank,
            "micro_batch": number,
            "precision": self._engine.precision,
            "words": words,
            "paths": [str(self._path_of(sample)) if sample >= 0 else "" for sample in batch.ids.tolist()],
        }
        problem = self._lacks_room(weights, batch, len(culprits))
        if problem is None:
            try:
                if rank in culprits:
                    write_replay_file(folder / _name(rank), batch, about)
                if rank == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    save_weights(folder / WEIGHTS, weights, self._description)
            except (OSError, RunError) as error:
                problem = str(error)
            problem = _first(problem)
            if problem is not None and rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        if problem is not None:
            if rank == 0:
                _log.warning("the clips of step %d cannot be kept: %s", step + 1, problem)
            return None, "; not kept for a replay"
        self._kept += 1
        return folder / _name(culprits[0]), ""

    def _lacks_room(self, weights: dict[str, Tensor], batch: ClipBatch, culprits: int) -> str | None:
        """Why the disk has no room for the evidence and, beside it, the next checkpoint. Collective."""
        pieces = owned_shards(self._engine.state_shards(), dist.get_rank(), dist.get_world_size())
        checkpoint = torch.tensor(sum(piece.values.nbytes for piece in pieces), device=self._engine.device)
        dist.all_reduce(checkpoint)
        evidence = sum(tensor.nbytes for tensor in weights.values()) + 4 * culprits * batch.clips.numel()
        problem = None
        if dist.get_rank() == 0:
            try:
                left = shutil.disk_usage(self._folder.parent).free - evidence
                if left < int(checkpoint) + MARGIN:
                    problem = f"{self._folder.parent} would have no room left for the next checkpoint"
            except OSError as error:
                problem = str(error)
        return _first(problem)


def _first(problem: str | None) -> str | None:
    """The first rank's problem, if any has one. Collective."""
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next((text for text in problems if text is not None), None)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"
