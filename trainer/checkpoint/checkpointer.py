"""Checkpoints: written beside the old one while training goes on, visible only when whole, newest good one
first.

All ranks copy their part of the training state to the host, which is all that training waits for, and write
it into a hidden folder in the background. The step after all have written and flushed, rank 0 describes what
must be there and makes the folder visible by one rename. So whatever dies, whenever: what is visible is
whole.

It counts as good once a step after it was finite: a step's own gradient says nothing of the weights that it
leaves. After the last step the evaluation takes that part. Until then older ones stay, and where the next
step is not finite it is withdrawn.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.atomic_file import flush
from trainer.checkpoint.metadata import (
    CheckpointError,
    TrainState,
    find_problem,
    read_state,
    shard_name,
    shards,
    write_state,
)
from trainer.checkpoint.retention import Retention, is_disk_full, step_of
from trainer.checkpoint.shards import Index, ShardReader, Snapshot, read_index
from trainer.checkpoint.weights_origin import check_settings_unchanged
from trainer.checkpoint.writer import Writer
from trainer.distributed.collectives import run_on_all_ranks
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.state_shards import owned_shards
from trainer.errors import AgreedError, RunError

_log = logging.getLogger(__name__)


class Checkpointer:
    """The checkpoints of one run.

    every_minutes: when rank 0 finds the next one due; None never does. attachments: files of the run that go
    along with each. Every method but `is_due` and `counts` is collective.
    """

    def __init__(
        self,
        retention: Retention,
        *,
        every_minutes: float | None,
        attachments: Sequence[Path] = (),
    ) -> None:
        self.retention = retention
        self._attachments = attachments
        self._seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._saved_at = time.monotonic()
        self._due = False  # whatever the clock says
        self._is_main = dist.get_rank() == 0
        self._snapshot: Snapshot | None = None
        self._writer = Writer()
        self._begun = 0
        self._lost = 0  # of those begun, which some rank could not write
        self._in_flight: TrainState | None = None
        self._confirmed = -1
        self._begun_at = 0.0
        self.took = 0.0
        """Seconds that the last save took, from the copy until it was visible."""
        self.longest = 0.0
        """Seconds that the slowest took so far."""
        self._total_bytes = 0
        self.freed_space = False
        """Whether the last one failed for want of room, and an old one was deleted, so that another try may
        succeed.
        """

    def is_due(self) -> bool:
        """Whether, on rank 0, enough time has gone by since the last save; other ranks never find so.

        Found due once: it takes the ranks a step to agree on the save.
        """
        if not self._is_main or not (self._due or time.monotonic() - self._saved_at > self._seconds):
            return False
        self._due = False
        self._saved_at = time.monotonic()
        return True

    def counts(self) -> tuple[int, int]:
        """How many checkpoints this rank has written, and failed to write; to be added up over all ranks."""
        return self._writer.finished, self._writer.failed

    @property
    def in_flight(self) -> int | None:
        """The step whose checkpoint is being written."""
        return None if self._in_flight is None else self._in_flight.step

    def begin(self, engine: Engine, state: TrainState) -> bool:
        """Copy the state and begin to write it; none may be in flight. Returns False where the disk has no
        room for it.
        """
        partial = self.retention.partial(state.step)
        if self._snapshot is None:
            self._prepare(engine)
        problem = [self.retention.free_space(state.step, self._total_bytes) if self._is_main else None]
        dist.broadcast_object_list(problem)
        self._saved_at = self._begun_at = time.monotonic()
        self.freed_space = False
        if problem[0] is not None:
            self._discard(state, problem[0])
            return False
        snapshot = self._snapshot
        assert snapshot is not None
        snapshot.take()
        self._begun += 1
        self._in_flight = state
        self._writer.start(lambda: snapshot.write(partial / shard_name(dist.get_rank())))
        return True

    def hear(self, finished: int, failed: int) -> Path | None:
        """Take note of how many checkpoints all ranks together have written and failed to write.

        Returns the checkpoint's folder when it has become visible thereby.
        """
        if self._in_flight is None or finished + failed < self._begun * dist.get_world_size():
            return None
        lost, self._lost = failed - self._lost, failed
        state, self._in_flight = self._in_flight, None
        error = self._writer.error
        if not lost and self._is_main:
            error = self._publish(state)
        # Of each rank that could not do its part, why, and whether for want of room.
        failures: list[Any] = [None] * dist.get_world_size()
        own = None if error is None else (dist.get_rank(), str(error) or repr(error), is_disk_full(error))
        dist.all_gather_object(failures, own)
        failures = [failure for failure in failures if failure is not None]
        if failures:
            rank, reason, _ = failures[0]
            self._discard(
                state, f"{len(failures)} of {dist.get_world_size()} ranks failed; rank {rank}: {reason}"
            )
            if any(full for _, _, full in failures):
                self._free_quota()
            return None
        # Not since `_saved_at`: meanwhile the next one may have been found due.
        self.took = time.monotonic() - self._begun_at
        self.longest = max(self.longest, self.took)
        return self.retention.final(state.step)

    def settle(self) -> Path | None:
        """Wait for the checkpoint that is being written, if one is.

        Returns its folder, None where it failed.
        """
        if self._in_flight is None:
            return None
        return self.hear(*self._wait())

    def confirm(self, step: int) -> None:
        """Take note that the numbers at the weights after `step` steps are finite: checkpoints of them, and
        older ones, are good, and what is not to be kept beside them may go. Each rank by itself.
        """
        self._confirmed = step
        if self._is_main:
            self.retention.confirmed(step)

    def doubt(self, reason: str) -> None:
        """Give up the checkpoint that is being written, and withdraw the newest, if they are of weights at
        which nothing was finite so far; the next is due at once.
        """
        if self._is_main and self.retention.withdraw(self._confirmed, reason):
            self.postpone()
        if self._in_flight is not None and self._in_flight.step > self._confirmed:
            _, self._lost = self._wait()
            state, self._in_flight = self._in_flight, None
            self._discard(state, reason)
            self.postpone()

    def postpone(self) -> None:
        """Have the next one due at once."""
        self._due = True

    def record_accuracy(self, step: int, top1: float) -> None:
        """Write down what the weights after so many steps came to: it decides which checkpoint stays."""
        if self._is_main:
            self.retention.record_accuracy(step, top1)

    def newest_step(self) -> int | None:
        """The step of the newest checkpoint that is visible; None where there is none."""
        visible = self.retention.visible() if self._is_main else []
        found = [step_of(visible[-1]) if visible else None]
        dist.broadcast_object_list(found)
        return found[0]

    def best_accuracy(self) -> float | None:
        """Top-1 of the most accurate checkpoint; None where none was evaluated."""
        best = self.retention.best() if self._is_main else None
        found = [None if best is None else best[1]]
        dist.broadcast_object_list(found)
        return found[0]

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over by name. None where there is none
        at all.

        Raises RunError when there are some and all are damaged, or of weights that were of no use: what they
        hold is not to be given up unasked.
        """
        found: list[Any] = [(self.retention.visible(), self.retention.withdrawn()) if self._is_main else None]
        dist.broadcast_object_list(found)
        visible, withdrawn = found[0]
        if withdrawn and not visible:
            raise AgreedError(
                f"the one checkpoint, {withdrawn[-1]}, is of weights at which nothing was finite. Go on from "
                "it all the same with --resume and its path; to begin anew, give --resume never and another "
                "folder with --run-dir"
            )
        problems = []
        for path in reversed(visible):
            problem = self._problem(path)
            if problem is None:
                return path
            if self._is_main:
                _log.warning("checkpoint %s is passed over: %s", path, problem)
            problems.append(f"  {path.name}: {problem}")
        if problems:
            raise AgreedError(
                f"none of the checkpoints in {self.retention.folder} can be used:\n"
                + "\n".join(problems)
                + "\n"
                "Put back a copy of one and start again, or go on from another with --resume PATH; to begin "
                "anew, give --resume never and another folder with --run-dir"
            )
        return None

    def read(
        self, path: Path, *, settings: dict[str, Any], allowed: Sequence[str], verify: bool = False
    ) -> TrainState:
        """What a checkpoint says of itself; no tensors are loaded. verify: whether to look for damage first.

        Raises RunError when it is damaged, or belongs to another training: settings differ that are not
        `allowed` to.
        """
        if verify and (problem := self._problem(path)) is not None:
            raise CheckpointError(path, problem)
        state = run_on_all_ranks(lambda: read_state(path))
        run_on_all_ranks(lambda: check_settings_unchanged(path, state, settings, allowed))
        return state

    def load(self, engine: Engine, path: Path, state: TrainState) -> None:
        """Put weights, moments, averages and statistics back, by whatever ranks and stage they were saved."""
        index = _read_headers(path, state)
        run_on_all_ranks(lambda: _fill(engine, path, index))
        engine.resume(state.updates)

    def _prepare(self, engine: Engine) -> None:
        self._snapshot = Snapshot(owned_shards(engine.state_shards(), dist.get_rank(), dist.get_world_size()))
        total = torch.tensor(self._snapshot.bytes, device=engine.device)
        dist.all_reduce(total)
        self._total_bytes = int(total)

    def _free_quota(self) -> None:
        """Give up an old checkpoint, and have the next due at once if there was one to give up."""
        made = [self.retention.delete_one() if self._is_main else False]
        dist.broadcast_object_list(made)
        self.freed_space = made[0]
        if self.freed_space:
            self._due = True

    def _publish(self, state: TrainState) -> OSError | None:
        """Describe the checkpoint and make it visible. Returns why that cannot be."""
        partial, final = self.retention.partial(state.step), self.retention.final(state.step)
        try:
            for file in self._attachments:
                if file.exists():
                    shutil.copy2(file, partial / file.name)
            write_state(partial, state)
            flush(partial)
            self.retention.replace(final)
            os.rename(partial, final)
            flush(self.retention.folder)
        except OSError as error:
            return error
        self.retention.published(final)
        self.retention.confirmed(self._confirmed)
        return None

    def _discard(self, state: TrainState, reason: str) -> None:
        if self._is_main:
            _log.warning("no checkpoint after step %d: %s", state.step, reason)
            self.retention.discard(state.step)

    def finish(self) -> None:
        """Wait for what is done in the background on this rank."""
        self._writer.wait()
        self.retention.finish_deleting()

    def _wait(self) -> tuple[int, int]:
        """Wait until all ranks have written, or failed to; their counts, added up."""
        self._writer.wait()
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, self.counts())
        return sum(finished for finished, _ in counts), sum(failed for _, failed in counts)

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint cannot be used, or None; each rank checks its share of the files."""
        every: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(every, find_problem(path, dist.get_rank(), dist.get_world_size()))
        return next((problem for problem in every if problem is not None), None)


def _read_headers(path: Path, state: TrainState) -> Index:
    """What lies where in all shards. Each rank opens its share of them: a thousand ranks that open a thousand
    files each would keep a shared file system busy for minutes. Collective.
    """
    own = shards(path, state)[dist.get_rank() :: dist.get_world_size()]

    def read() -> Index:
        with _about(path):
            return read_index(own)

    parts: list[Index] = [{}] * dist.get_world_size()
    dist.all_gather_object(parts, run_on_all_ranks(read))
    index: Index = {}
    for part in parts:
        for key, stored in part.items():
            index.setdefault(key, []).extend(stored)
    return index


def _fill(engine: Engine, path: Path, index: Index) -> None:
    reader = ShardReader(index)
    with _about(path):
        for piece in engine.state_shards():
            if piece.key.startswith("average/") and piece.key not in index:
                engine.start_ema()  # it was not kept so far
                return
            reader.fill(piece)


@contextmanager
def _about(checkpoint: Path) -> Iterator[None]:
    """What is said of a shard names its checkpoint too."""
    try:
        yield
    except RunError as error:
        raise CheckpointError(checkpoint, str(error)) from error
