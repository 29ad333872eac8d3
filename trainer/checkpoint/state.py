"""What a checkpoint says of itself, and whether it is whole."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainer import RunError
from trainer.checkpoint.shards import damage, seal

FORMAT = 2
STATE = "state.json"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from the tensors.

    step: optimiser steps done, which is also the position in the data. updates: of them, those that changed
    the weights. world_size, zero_stage: by whom it was written. settled: what may not change during a run, by
    its name in the recipe. clips, bad: seen so far. spent: time spent so far, by kind. saved_at: seconds
    since 1970. description: what is needed to use the weights: `model`, `class_names`, `preprocessing`,
    `recipe`.
    """

    step: int
    updates: int
    world_size: int
    zero_stage: int
    settled: dict[str, Any]
    clips: int
    bad: int
    spent: dict[str, float]
    saved_at: float
    description: dict[str, Any]


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


def write_state(folder: Path, state: TrainState) -> None:
    path = folder / STATE
    path.write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1) + "\n", encoding="utf-8")
    seal(path)


def read_state(folder: Path) -> TrainState:
    """Raises RunError for a folder that is no checkpoint of this format, or whose description is damaged."""
    path = folder / STATE
    if not folder.is_dir():
        raise RunError(f"checkpoint {folder} cannot be used: there is no such folder")
    if (folder / "engine").is_dir():
        raise RunError(
            f"checkpoint {folder} cannot be used: an earlier version of this program wrote "
            "it; go on with that one"
        )
    problem = damage(path)
    if problem is not None:
        raise RunError(f"checkpoint {folder} cannot be used: {problem}")
    described = json.loads(path.read_text(encoding="utf-8"))
    known = {field.name for field in fields(TrainState)}
    if described.pop("format") != FORMAT or set(described) != known:
        raise RunError(f"checkpoint {folder} cannot be used: {STATE} is of another version of this program")
    return TrainState(**described)


def is_described(folder: Path) -> bool:
    """Whether `read_state` would succeed."""
    try:
        read_state(folder)
    except RunError:
        return False
    return True


def shards(folder: Path, state: TrainState) -> list[Path]:
    return [folder / shard_name(rank) for rank in range(state.world_size)]
