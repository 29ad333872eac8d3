"""Finds the checkpoint that a run resumes from, and loads it with any number of ranks and any ZeRO stage."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.metadata import CheckpointError, TrainState, find_problem, read_state, shards
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.shards import Index, ShardReader, read_index
from trainer.checkpoint.weights_origin import check_settings_unchanged
from trainer.distributed.collectives import broadcast_from_main, find_first, gather, run_on_all_ranks
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import AgreedError, RunError

_log = logging.getLogger(__name__)


def find_newest(retention: Retention) -> Path | None:
    """The newest undamaged checkpoint; None where the folder holds none at all. Collective.

    Logs a warning for each damaged one that is newer. Raises AgreedError where all are damaged or withdrawn:
    a new training must not replace them without being asked to.
    """
    is_main = dist.get_rank() == 0
    visible, withdrawn = broadcast_from_main(
        (retention.visible(), retention.withdrawn()) if is_main else ([], [])
    )
    if withdrawn and not visible:
        raise AgreedError(
            f"the weights of the only checkpoint, {withdrawn[-1]}, gave no finite numbers. Name it with "
            "--resume to resume from it all the same; to train anew, give --resume never and another folder "
            "with --run-dir"
        )
    problems = []
    for path in reversed(visible):
        problem = _find_problem(path)
        if problem is None:
            return path
        if is_main:
            _log.warning("checkpoint %s is passed over: %s", path, problem)
        problems.append(f"  {path.name}: {problem}")
    if problems:
        raise AgreedError(
            f"none of the checkpoints in {retention.folder} can be used:\n" + "\n".join(problems) + "\n"
            "Put back a copy of one and start again, or resume from another with --resume PATH; to train "
            "anew, give --resume never and another folder with --run-dir"
        )
    return None


def read_for_resume(
    path: Path, *, settings: dict[str, Any], allowed: Sequence[str], verify: bool = False
) -> TrainState:
    """The metadata of a checkpoint; reads no tensor. Collective.

    verify: whether to check all files for damage first. Raises RunError where it is damaged, or where
    settings differ that are not `allowed` to.
    """
    if verify and (problem := _find_problem(path)) is not None:
        raise CheckpointError(path, problem)
    state = run_on_all_ranks(lambda: read_state(path))
    run_on_all_ranks(lambda: check_settings_unchanged(path, state, settings, allowed))
    return state


def restore(engine: Engine, path: Path, state: TrainState) -> None:
    """Load weights, moments, EMA and batch-norm statistics into the engine. Collective."""
    index = _read_headers(path, state)
    run_on_all_ranks(lambda: _fill(engine, path, index))
    engine.resume(state.updates)


def _find_problem(path: Path) -> str | None:
    """Why a checkpoint cannot be used, or None; each rank checks its share of the files. Collective."""
    return find_first(find_problem(path, dist.get_rank(), dist.get_world_size()))


def _read_headers(path: Path, state: TrainState) -> Index:
    """The index of all shards. Collective.

    Each rank opens its share of them: a thousand ranks that each open a thousand files would keep a shared
    file system busy for minutes.
    """
    own = shards(path, state)[dist.get_rank() :: dist.get_world_size()]

    def read() -> Index:
        with _naming(path):
            return read_index(own)

    index: Index = {}
    for part in gather(run_on_all_ranks(read)):
        for key, stored in part.items():
            index.setdefault(key, []).extend(stored)
    return index


def _fill(engine: Engine, path: Path, index: Index) -> None:
    reader = ShardReader(index)
    with _naming(path):
        for piece in engine.state_shards():
            if piece.key.startswith("average/") and piece.key not in index:
                engine.start_ema()  # the checkpoint was saved without one
                return
            reader.fill(piece)


@contextmanager
def _naming(checkpoint: Path) -> Iterator[None]:
    """Adds the checkpoint's name to the error of a shard."""
    try:
        yield
    except RunError as error:
        raise CheckpointError(checkpoint, str(error)) from error
