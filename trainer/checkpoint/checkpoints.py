"""Checkpoints: visible only when whole, newest good one first.

All ranks write into a hidden folder; when all have written and flushed, rank 0 describes what must be there
and makes the folder visible by one rename. DeepSpeed's own `latest` file is not used: it is written without
waiting for the other ranks' shards.

Loading unpickles, so it is confined to a run's own folder, and to one that is named with --resume.
"""

import json
import logging
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer import RunError
from trainer.engine.engine import Engine

_SHARDS = "engine"
_STATE = "state.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from weights and optimiser.

    step: optimiser steps done, which is also the position in the data. world_size, zero_stage: how the shards
    are cut. settled: what may not change during a run, by its name in the recipe. clips, bad: seen so far.
    spent: time spent so far, by kind.
    """

    step: int
    world_size: int
    zero_stage: int
    settled: dict[str, Any]
    clips: int
    bad: int
    spent: dict[str, float]


class Checkpoints:
    """The checkpoints of one run.

    folder: holds `step-0000123/`, .... keep_last: how many stay. every_minutes: when rank 0 finds the next
    one due; None never does. `newest`, `save` and `load` are collective.
    """

    def __init__(self, folder: Path, *, keep_last: int, every_minutes: float | None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._saved_at = time.monotonic()
        self._is_main = dist.get_rank() == 0

    def is_due(self) -> bool:
        """Whether, on rank 0, enough time has gone by since the last save; other ranks never find so.

        Found due once: it takes the ranks a step to agree on the save.
        """
        if not self._is_main or time.monotonic() - self._saved_at <= self._seconds:
            return False
        self._saved_at = time.monotonic()
        return True

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Save, make visible, delete the oldest. Returns the checkpoint's folder."""
        final = self.folder / f"step-{state.step:07d}"
        partial = self.folder / f".step-{state.step:07d}.partial"
        if self._is_main and partial.exists():
            shutil.rmtree(partial)
        dist.barrier()
        engine.average_statistics()
        engine.deepspeed.save_checkpoint(str(partial), tag=_SHARDS, save_latest=False)
        torch.save(_random_states(engine), partial / _random_file())
        _flush(partial)
        dist.barrier()
        if self._is_main:
            files = {
                str(file.relative_to(partial)): file.stat().st_size
                for file in sorted(partial.rglob("*"))
                if file.is_file()
            }
            _write_flushed(partial / _STATE, json.dumps({**asdict(state), "files": files}, indent=2))
            if final.exists():
                shutil.rmtree(final)
            os.rename(partial, final)
            _flush_folder(self.folder)
            self._prune(final)
        dist.barrier()
        self._saved_at = time.monotonic()
        return final

    def newest(self) -> Path | None:
        """The newest checkpoint that rank 0 finds whole; damaged ones are passed over by name. Collective."""
        found = [self._newest() if self._is_main else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _newest(self) -> Path | None:
        for path in reversed(_visible(self.folder)):
            problem = _problem(path)
            if problem is None:
                return path
            _log.warning("checkpoint %s is passed over: %s", path, problem)
        return None

    def read(self, path: Path, *, world_size: int, zero_stage: int, settled: dict[str, Any]) -> TrainState:
        """What a checkpoint says of itself; nothing is loaded.

        Raises RunError when it is damaged, or does not belong to this run: other ranks, stage, or settings.
        """
        problem = _problem(path)
        if problem is not None:
            raise RunError(f"checkpoint {path} cannot be used: {problem}")
        described = json.loads((path / _STATE).read_text(encoding="utf-8"))
        described.pop("files")
        state = TrainState(**described)
        if (state.world_size, state.zero_stage) != (world_size, zero_stage):
            raise RunError(
                f"checkpoint {path} was saved by {state.world_size} ranks with ZeRO {state.zero_stage}; this "
                f"run has {world_size} ranks with ZeRO {zero_stage}. Start with the same, or train anew with "
                "another --run-dir"
            )
        changed = [
            f"{name}: {state.settled.get(name)!r} then, {settled.get(name)!r} now"
            for name in sorted({*state.settled, *settled})
            if state.settled.get(name) != settled.get(name)
        ]
        if changed:
            raise RunError(
                f"checkpoint {path} is of another training:\n  " + "\n  ".join(changed) + "\n"
                "Change it back to continue, or train anew with another --run-dir"
            )
        return state

    def load(self, engine: Engine, path: Path) -> None:
        """Put weights, optimiser and random states back."""
        engine.deepspeed.load_checkpoint(str(path), tag=_SHARDS)
        _restore_random_states(torch.load(path / _random_file(), weights_only=True), engine)

    def tidy(self, step: int) -> None:
        """Before a run goes on after `step`: remove what was cut off, set aside what is later.

        A later checkpoint belongs to a branch that is given up; left in place, the newest would be it.
        To be called on rank 0 only.
        """
        for partial in self.folder.glob(".step-*.partial"):
            shutil.rmtree(partial)
        for path in _visible(self.folder):
            if int(path.name.removeprefix("step-")) > step and _problem(path) is None:
                aside = path.with_name(f"set-aside-{path.name}-{time.strftime('%Y%m%d-%H%M%S')}")
                _log.warning("%s lies after the step the run goes on from: renamed to %s", path, aside.name)
                path.rename(aside)

    def _prune(self, newest: Path) -> None:
        others = [path for path in _visible(self.folder) if path != newest]
        for old in others[: len(others) - self._keep_last + 1]:
            shutil.rmtree(old)


def _visible(folder: Path) -> list[Path]:
    """Checkpoints that were made visible, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    if not path.is_dir():
        return "there is no such folder"
    try:
        described = json.loads((path / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{_STATE} cannot be read ({error})"
    for name, size in described["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def _random_file() -> str:
    return f"random-rank{dist.get_rank():05d}.pt"


def _random_states(engine: Engine) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if engine.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(engine.device)
    return states


def _restore_random_states(states: dict[str, Any], engine: Engine) -> None:
    torch.set_rng_state(states["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], engine.device)


def _flush(folder: Path) -> None:
    """Make sure that what is there has reached the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _write_flushed(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
