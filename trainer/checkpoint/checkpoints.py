"""Checkpoints: written beside the old one while training goes on, visible only when whole, newest good one
first.

All ranks copy their part of the training state to the host, which is all that training waits for, and write
it into a hidden folder in the background. The step after all have written and flushed, rank 0 describes what
must be there and makes the folder visible by one rename. So whatever dies, whenever: what is visible is
whole.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import RunError
from trainer.agreement import together
from trainer.checkpoint.shards import ShardReader, Snapshot, damage, flush, read_index
from trainer.checkpoint.shelf import Shelf
from trainer.checkpoint.state import TrainState, read_state, shard_name, shards, write_state
from trainer.checkpoint.writer import Writer
from trainer.engine.engine import Engine
from trainer.engine.pieces import shares

_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run.

    every_minutes: when rank 0 finds the next one due; None never does. attachments: files of the run that go
    along with each. Every method but `is_due` and `counts` is collective.
    """

    def __init__(
        self,
        shelf: Shelf,
        *,
        every_minutes: float | None,
        attachments: Sequence[Path] = (),
    ) -> None:
        self.shelf = shelf
        self._attachments = attachments
        self._seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._saved_at = time.monotonic()
        self._is_main = dist.get_rank() == 0
        self._snapshot: Snapshot | None = None
        self._writer = Writer()
        self._begun = 0
        self._lost = 0  # of those begun, which some rank could not write
        self._in_flight: TrainState | None = None
        self._begun_at = 0.0
        self.took = 0.0
        """Seconds that the last save took, from the copy until it was visible."""
        self.longest = 0.0
        """Seconds that the slowest took so far."""
        self._total_bytes = 0

    def is_due(self) -> bool:
        """Whether, on rank 0, enough time has gone by since the last save; other ranks never find so.

        Found due once: it takes the ranks a step to agree on the save.
        """
        if not self._is_main or time.monotonic() - self._saved_at <= self._seconds:
            return False
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
        partial = self.shelf.partial(state.step)
        if self._snapshot is None:
            self._prepare(engine)
        problem = [self.shelf.make_room(state.step, self._total_bytes) if self._is_main else None]
        dist.broadcast_object_list(problem)
        self._saved_at = self._begun_at = time.monotonic()
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
        problem = f"{lost} of {dist.get_world_size()} ranks could not write" if lost else None
        if self._writer.problem:
            _log.warning("rank %d: %s", dist.get_rank(), self._writer.problem)
            self._writer.problem = ""
        outcome = [problem or (self._publish(state) if self._is_main else None)]
        dist.broadcast_object_list(outcome)
        if outcome[0] is not None:
            self._discard(state, outcome[0])
            return None
        # Not since `_saved_at`: meanwhile the next one may have been found due.
        self.took = time.monotonic() - self._begun_at
        self.longest = max(self.longest, self.took)
        return self.shelf.final(state.step)

    def settle(self) -> Path | None:
        """Wait for the checkpoint that is being written, if one is.

        Returns its folder, None where it failed.
        """
        if self._in_flight is None:
            return None
        return self.hear(*self._wait())

    def drop(self, reason: str) -> None:
        """Give up the checkpoint that is being written, if one is; the next is due at once."""
        if self._in_flight is None:
            return
        _, self._lost = self._wait()
        state, self._in_flight = self._in_flight, None
        self._discard(state, reason)
        self._saved_at = -math.inf

    def note_accuracy(self, step: int, top1: float) -> None:
        """Write down what the weights after so many steps came to: it decides which checkpoint stays."""
        if self._is_main:
            self.shelf.note_accuracy(step, top1)

    def best_accuracy(self) -> float | None:
        """Top-1 of the most accurate checkpoint; None where none was evaluated."""
        best = self.shelf.best() if self._is_main else None
        found = [None if best is None else best[1]]
        dist.broadcast_object_list(found)
        return found[0]

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over by name."""
        found = [self.shelf.visible() if self._is_main else None]
        dist.broadcast_object_list(found)
        for path in reversed(found[0] or []):
            problem = self._problem(path)
            if problem is None:
                return path
            if self._is_main:
                _log.warning("checkpoint %s is passed over: %s", path, problem)
        return None

    def read(
        self, path: Path, *, settled: dict[str, Any], allowed: Sequence[str], verify: bool = False
    ) -> TrainState:
        """What a checkpoint says of itself; no tensors are loaded. verify: whether to look for damage first.

        Raises RunError when it is damaged, or belongs to another training: settings differ that are not
        `allowed` to.
        """
        if verify and (problem := self._problem(path)) is not None:
            raise RunError(f"checkpoint {path} cannot be used: {problem}")
        state = together(lambda: read_state(path))
        together(lambda: _check_settled(path, state.settled, settled, allowed))
        return state

    def load(self, engine: Engine, path: Path, state: TrainState) -> None:
        """Put weights, moments, averages and statistics back, by whatever ranks and stage they were saved."""
        together(lambda: self._fill(engine, path, state))
        engine.resume(state.updates)

    def _fill(self, engine: Engine, path: Path, state: TrainState) -> None:
        reader = ShardReader(read_index(shards(path, state)))
        try:
            for piece in engine.pieces():
                if piece.key.startswith("average/") and piece.key not in reader.index:
                    engine.begin_average()  # it was not kept so far
                    return
                reader.fill(piece)
        except RunError as error:
            raise RunError(f"checkpoint {path} cannot be used: {error}") from error

    def _prepare(self, engine: Engine) -> None:
        self._snapshot = Snapshot(shares(engine.pieces(), dist.get_rank(), dist.get_world_size()))
        total = torch.tensor(self._snapshot.bytes, device=engine.device)
        dist.all_reduce(total)
        self._total_bytes = int(total)

    def _publish(self, state: TrainState) -> str | None:
        """Describe the checkpoint and make it visible. Returns why that cannot be."""
        partial, final = self.shelf.partial(state.step), self.shelf.final(state.step)
        try:
            for file in self._attachments:
                if file.exists():
                    shutil.copy2(file, partial / file.name)
            write_state(partial, state)
            flush(partial)
            self.shelf.replace(final)
            os.rename(partial, final)
            flush(self.shelf.folder)
        except OSError as error:
            return str(error)
        self.shelf.prune()
        return None

    def _discard(self, state: TrainState, reason: str) -> None:
        if self._is_main:
            _log.warning("no checkpoint after step %d: %s", state.step, reason)
            self.shelf.discard(state.step)

    def finish(self) -> None:
        """Wait for what is done in the background on this rank."""
        self._writer.wait()
        self.shelf.finish_deleting()

    def _wait(self) -> tuple[int, int]:
        """Wait until all ranks have written, or failed to; their counts, added up."""
        self._writer.wait()
        counts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(counts, self.counts())
        return sum(finished for finished, _ in counts), sum(failed for _, failed in counts)

    def _problem(self, path: Path) -> str | None:
        """Why a checkpoint cannot be used, or None; each rank checks its share of the files."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        try:
            files = shards(path, read_state(path))
            found = [damage(file) for file in files[rank::world_size]]
        except RunError as error:
            found = [str(error).partition("cannot be used: ")[2]]
        every: list[Any] = [None] * world_size
        dist.all_gather_object(every, [problem for problem in found if problem])
        problems = [problem for part in every for problem in part]
        return problems[0] if problems else None


def _check_settled(path: Path, then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> None:
    changed = {
        name: (then.get(name), now.get(name))
        for name in sorted({*then, *now})
        if then.get(name) != now.get(name)
    }
    refused = {name: values for name, values in changed.items() if name not in allowed}
    if refused:
        lines = [
            f"{name}: {_brief(before)} then, {_brief(after)} now" for name, (before, after) in refused.items()
        ]
        flags = " ".join(f"--allow-change '{name}'" for name in refused)
        raise RunError(
            f"checkpoint {path} is of another training:\n  " + "\n  ".join(lines) + "\n"
            f"Change it back to continue, or train anew with another --run-dir; where it is meant: {flags}"
        )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"
