"""Saves the training state while training continues.

Each rank copies its part of the state to host memory; training waits for this copy only. A thread per rank
then writes the copy to a hidden folder. When all ranks have written and flushed their shards, rank 0 adds the
metadata and renames the folder. A crash at any time therefore leaves only complete checkpoints visible.

A checkpoint is confirmed when a later step has a finite gradient, because the gradient of a step says nothing
about the weights that this step produces. After the last step the evaluation confirms it. Older checkpoints
are kept until then. If the next step is not finite, the checkpoint is withdrawn.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.atomic_file import flush
from trainer.checkpoint.metadata import Progress, TrainState, shard_name, write_state
from trainer.checkpoint.retention import Retention, is_disk_full, step_of
from trainer.checkpoint.shards import Snapshot
from trainer.distributed.collectives import broadcast_from_main, gather
from trainer.distributed.step_sync import StepTotals
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.state_shards import owned_shards

_log = logging.getLogger(__name__)

_Failure = tuple[int, str, bool]  # rank, reason, whether the disk or a quota is full


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become visible."""

    step: int
    """Optimiser steps done."""
    path: Path
    """Its folder."""
    seconds: float
    """Time from the copy until it was visible."""


class _Save:
    """A checkpoint that is being written: this rank's thread, and its error if it fails."""

    def __init__(self, state: TrainState, write: Callable[[], None]) -> None:
        self.state = state
        self.started = time.monotonic()
        self.error: Exception | None = None
        # A daemon: a process that exits does not wait for it. The partial folder is invisible.
        self.thread = threading.Thread(target=self._run, args=(write,), name="checkpoint writer", daemon=True)
        self.thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # of any type: the other ranks wait for this rank's result
            self.error = error


@dataclass
class Checkpointer:
    """The one owner of a run's saves: which step is due, being written, saved and confirmed.

    The queries `is_due`, `is_writing` and `has` concern this rank. All other methods but `confirm`,
    `postpone` and `close` are collective.
    """

    retention: Retention
    """Of the run's checkpoints folder; used on rank 0."""
    every_minutes: float | None
    """Interval after which rank 0 finds a save due; None for never."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Recorded in each checkpoint, see `TrainState`."""
    description: dict[str, Any] = field(default_factory=dict)
    """The same."""
    attachments: Sequence[Path] = ()
    """Files of the run that are copied into each checkpoint."""
    saved_step: int = -1
    """The newest step with a visible checkpoint; -1 without any."""
    best: float | None = None
    """Top-1 of the most accurate evaluation; None where none was evaluated."""
    longest_save: float = 0.0
    """Seconds of the slowest save of all attempts so far."""
    can_retry: bool = False
    """Whether the last save failed on a full disk, and an old checkpoint was deleted to make space."""

    def __post_init__(self) -> None:
        self._interval = math.inf if self.every_minutes is None else 60 * self.every_minutes
        self._last_begun = time.monotonic()
        self._postponed = False
        self._is_main = dist.get_rank() == 0
        self._snapshot: Snapshot | None = None
        self._total_bytes = 0  # of one checkpoint, over all ranks
        self._save: _Save | None = None
        self._confirmed = -1  # newest step whose weights gave finite numbers

    @property
    def is_due(self) -> bool:
        """Whether rank 0 finds the interval over, or a save was postponed; False on other ranks."""
        return self._is_main and (self._postponed or time.monotonic() - self._last_begun > self._interval)

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing its shard."""
        return self._save is not None and self._save.thread.is_alive()

    def has(self, step: int) -> bool:
        """Whether the checkpoint of this step is visible or being written."""
        return step == self.saved_step or (self._save is not None and step == self._save.state.step)

    def begin(self, engine: Engine, progress: Progress) -> bool:
        """Copy the state and start to write it. No other save may be in progress.

        Returns False where the disk has no space for it.
        """
        partial = self.retention.partial_path(progress.step)
        if self._snapshot is None:
            self._snapshot = Snapshot(
                owned_shards(engine.state_shards(), dist.get_rank(), dist.get_world_size())
            )
            total = torch.tensor(self._snapshot.bytes, device=engine.device)
            dist.all_reduce(total)
            self._total_bytes = int(total)
        snapshot = self._snapshot
        problem = broadcast_from_main(
            self.retention.free_space(progress.step, self._total_bytes) if self._is_main else None
        )
        self._last_begun, self._postponed, self.can_retry = time.monotonic(), False, False
        if problem is not None:
            self._discard(progress.step, problem)
            return False
        state = TrainState(
            **vars(progress),
            updates=engine.updates,
            world_size=dist.get_world_size(),
            zero_stage=engine.zero_stage,
            settings=self.settings,
            saved_at=time.time(),
            description=self.description,
            micro_batch=engine.micro_batch,
        )
        snapshot.capture()
        self._save = _Save(state, lambda: snapshot.write(partial / shard_name(dist.get_rank())))
        return True

    def poll(self, totals: StepTotals) -> Saved | None:
        """Publish the checkpoint once no rank writes it any more, by the totals of a step after `begin`.

        Returns the checkpoint when it has become visible.
        """
        if self._save is None or totals.step < self._save.state.step or totals.writing:
            return None
        return self._finish()

    def wait(self) -> Saved | None:
        """Wait until the checkpoint in progress is written, and publish it. Returns None where it failed."""
        return None if self._save is None else self._finish()

    def confirm(self, step: int) -> None:
        """Record that the weights after `step` steps gave finite numbers: their checkpoint and older ones are
        good, and retention deletes what they replace.
        """
        self._confirmed = step
        if self._is_main:
            self.retention.confirm(step)

    def withdraw(self, reason: str) -> None:
        """Discard the checkpoint in progress and withdraw the newest one, if neither is confirmed. The next
        save is due at once.
        """
        if self._is_main and self.retention.withdraw(self._confirmed, reason):
            self.postpone()
        if self._save is not None and self._save.state.step > self._confirmed:
            step = self._save.state.step
            self._save.thread.join()
            dist.barrier()  # rank 0 deletes what all have written
            self._save = None
            self._discard(step, reason)
            self.postpone()

    def postpone(self) -> None:
        """Make the next save due at once."""
        self._postponed = True

    def record_accuracy(self, step: int, top1: float) -> bool:
        """Record an evaluation. Returns whether its weights are the most accurate so far and need to be
        saved.
        """
        if math.isnan(top1):  # no validation video could be read
            return False
        if self._is_main:
            self.retention.record_accuracy(step, top1)
        if self.best is not None and top1 <= self.best:
            return False
        self.best = top1
        return self.retention.keep_best and not self.has(step)

    def describe_newest(self) -> str:
        """The checkpoint from which the next attempt resumes, for a message."""
        visible = self.retention.visible() if self._is_main else []
        step = broadcast_from_main(step_of(visible[-1]) if visible else None)
        return "there is no checkpoint" if step is None else f"the last checkpoint is of step {step}"

    def close(self) -> None:
        """Wait for this rank's writing and deleting."""
        if self._save is not None:
            self._save.thread.join()
        self.retention.finish_deleting()

    def _finish(self) -> Saved | None:
        """Wait for all ranks' shards, and publish the checkpoint or discard it."""
        save, self._save = self._save, None
        assert save is not None
        save.thread.join()
        failures = self._gather_failures(save.error)
        if not failures:
            failures = self._gather_failures(self._publish(save.state) if self._is_main else None)
        if failures:
            rank, reason, _ = failures[0]
            world_size = dist.get_world_size()
            self._discard(
                save.state.step, f"{len(failures)} of {world_size} ranks failed; rank {rank}: {reason}"
            )
            if any(is_full for _, _, is_full in failures):
                self.can_retry = broadcast_from_main(self.retention.delete_one() if self._is_main else False)
                self._postponed = self._postponed or self.can_retry
            return None
        seconds = time.monotonic() - save.started
        self.longest_save = max(self.longest_save, seconds)
        self.saved_step = save.state.step
        return Saved(save.state.step, self.retention.path_of(save.state.step), seconds)

    @staticmethod
    def _gather_failures(error: Exception | None) -> list[_Failure]:
        """The failures of all ranks, in the order of ranks."""
        own = None if error is None else (dist.get_rank(), str(error) or repr(error), is_disk_full(error))
        return [failure for failure in gather(own) if failure is not None]

    def _publish(self, state: TrainState) -> OSError | None:
        """Add the metadata and rename the folder. Returns the error where that fails."""
        partial, path = self.retention.partial_path(state.step), self.retention.path_of(state.step)
        try:
            for file in self.attachments:
                if file.exists():
                    shutil.copy2(file, partial / file.name)
            write_state(partial, state)
            flush(partial)
            self.retention.replace(path)
            os.rename(partial, path)
            flush(self.retention.folder)
        except OSError as error:
            return error
        self.retention.add_unconfirmed(path)
        self.retention.confirm(self._confirmed)
        return None

    def _discard(self, step: int, reason: str) -> None:
        if self._is_main:
            _log.warning("no checkpoint after step %d: %s", step, reason)
            self.retention.discard(step)
