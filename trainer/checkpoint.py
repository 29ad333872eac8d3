"""Checkpoints: visible only when whole, newest good one first.

All ranks write into a hidden folder; when all have written and flushed, rank 0 describes what must be there
and makes the folder visible by one rename. DeepSpeed's own `latest` file is not used: it is written without
waiting for the other ranks' shards.

Loading unpickles, so it is confined to a run's own folder.
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
from trainer.engine import Engine

_SHARDS = "engine"
_STATE = "state.json"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from weights and optimiser.

    step: optimiser steps done, which is also the position in the data. world_size, zero_stage: how the shards
    are cut. fingerprint: of the training manifest. seconds: time spent so far, by kind.
    """

    step: int
    world_size: int
    zero_stage: int
    fingerprint: str
    seconds: dict[str, float]


class Checkpoints:
    """The checkpoints of one run.

    folder: holds `step-0000123/`, .... keep_last: how many stay. every_minutes: when rank 0 finds the next
    one due; None never does. All methods but `is_due` are collective.
    """

    def __init__(self, folder: Path, *, keep_last: int, every_minutes: float | None) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._seconds = math.inf if every_minutes is None else 60 * every_minutes
        self._saved_at = time.monotonic()
        self._is_main = dist.get_rank() == 0

    def is_due(self) -> bool:
        """Whether, on rank 0, enough time has gone by since the last save; other ranks never find so."""
        return self._is_main and time.monotonic() - self._saved_at > self._seconds

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
        _flush_own(partial)
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
            self._prune()
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

    def load(self, engine: Engine, path: Path, *, fingerprint: str) -> TrainState:
        """Put weights, optimiser and random states back.

        Raises RunError when the checkpoint is damaged, or belongs to other data, ranks or ZeRO stage.
        """
        problem = _problem(path)
        if problem is not None:
            raise RunError(f"checkpoint {path} cannot be used: {problem}")
        described = json.loads((path / _STATE).read_text(encoding="utf-8"))
        described.pop("files")
        state = TrainState(**described)
        here = (dist.get_world_size(), engine.zero_stage)
        if (state.world_size, state.zero_stage) != here:
            raise RunError(
                f"checkpoint {path} was saved by {state.world_size} ranks with ZeRO {state.zero_stage}; this "
                f"run has {here[0]} ranks with ZeRO {here[1]}. Start with the same, or train anew with "
                "another --run-dir"
            )
        if state.fingerprint != fingerprint:
            raise RunError(
                f"checkpoint {path} was trained on another manifest (fingerprint {state.fingerprint[:12]}, "
                f"data.train has {fingerprint[:12]}); restore that manifest, or train anew with another "
                "--run-dir"
            )
        engine.deepspeed.load_checkpoint(str(path), tag=_SHARDS)
        _restore_random_states(torch.load(path / _random_file(), weights_only=True), engine)
        return state

    def _prune(self) -> None:
        for old in _visible(self.folder)[: -self._keep_last]:
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


def _flush_own(folder: Path) -> None:
    """Make sure that what this machine wrote has reached the disk."""
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
