"""`state.json`: what a checkpoint records about itself, and whether the checkpoint is complete."""

import difflib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from models import UniFormerV2Config
from models.weights.safetensors_header import shorten
from trainer.checkpoint.shards import Count, find_damage, find_nonfinite, write_checksum
from trainer.errors import RunError

FORMAT = 2
STATE = "state.json"
WEIGHTS = "model.weights"
"""The setting that is compared by the content of the file, see `is_same_origin`."""
_OF_THE_MODEL = ("model.", "data.train (class names)")


class CheckpointError(RunError):
    """A checkpoint cannot be used. reason: why, without the name of the checkpoint."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(f"checkpoint {folder} cannot be used: {reason}")
        self.reason = reason


Seconds = Annotated[float, Field(strict=True, ge=0, lt=1e12)]


@dataclass(frozen=True)
class Progress:
    """How far a training is."""

    step: Count
    """Optimiser steps done, which is also the position in the data."""
    clips: Count
    """Clips seen so far, over all ranks."""
    bad: Count
    """Of these clips, those that could not be read."""
    spent: dict[str, Count | Seconds]
    """Time spent so far, by kind of activity."""


@dataclass(frozen=True)
class TrainState(Progress):
    """What a checkpoint records about itself, apart from the tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    updates: Count
    """Of the steps, those that changed the weights."""
    world_size: Annotated[int, Field(strict=True, gt=0, le=2**17)]
    """Ranks that wrote the checkpoint, and its shards."""
    zero_stage: Annotated[int, Field(strict=True, ge=0, le=3)]
    """ZeRO stage of the engine that wrote it."""
    settings: Annotated[dict[str, Any], Field(alias="settled")]
    """What may not change when the run is resumed, by its name in the recipe."""
    saved_at: Seconds
    """When it was saved, in seconds since 1970."""
    description: dict[str, Any]
    """What is needed to use the weights: `model`, `class_names`, `preprocessing`, `recipe`."""
    micro_batch: Annotated[int, Field(strict=True, gt=0, le=2**31)] | None = None
    """Clips per rank and forward pass; None in checkpoints of earlier versions."""


_STORED = TypeAdapter(TrainState)


def shard_name(rank: int) -> str:
    return f"shard-{rank:05d}.safetensors"


_SHARD_NAME = re.compile(r"shard-\d{5,}\.safetensors")


def check_is_no_shard(file: Path) -> None:
    """Raises RunError for a shard of a checkpoint, which is read as a whole."""
    if _SHARD_NAME.fullmatch(file.name) and (file.parent / STATE).is_file():
        raise RunError(f"{file} is a part of a checkpoint; name the checkpoint, {file.parent}")


def write_state(folder: Path, state: TrainState) -> None:
    path = folder / STATE
    stored = {"format": FORMAT, **_STORED.dump_python(state, by_alias=True)}
    path.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    write_checksum(path)


def read_state(folder: Path) -> TrainState:
    """Raises CheckpointError for a folder that is no checkpoint of this format, or damaged metadata."""
    path = folder / STATE
    if not folder.is_dir():
        raise CheckpointError(folder, "there is no such folder")
    if (folder / "engine").is_dir():
        raise CheckpointError(folder, "an earlier version of this program wrote it; resume with that version")
    problem = find_damage(path)
    if problem is not None:
        raise CheckpointError(folder, problem)
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(folder, f"{STATE} cannot be read ({error})") from error
    other = CheckpointError(folder, f"{STATE} is of another version of this program")
    if not isinstance(described, dict) or described.pop("format", None) != FORMAT:
        raise other
    try:
        return _STORED.validate_python(described)
    except ValidationError as error:
        wrong = error.errors()[0]
        if wrong["type"] in ("missing", "unexpected_keyword_argument"):
            raise other from None
        name = wrong["loc"][0]
        raise CheckpointError(folder, f"{STATE} is damaged: {name} is {shorten(described[name])}") from None


def read_newest(folders: Sequence[Path]) -> tuple[Path, TrainState] | None:
    """The newest of these checkpoints whose metadata can be read, oldest first; None where there are none.

    Raises the newest one's CheckpointError where none can be read.
    """
    problem = None
    for path in reversed(folders):
        try:
            return path, read_state(path)
        except CheckpointError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def find_problem(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Why a checkpoint cannot be used, or None. Reads all of it, or a rank's share of its shards.

    Values that are not finite count as damage: neither training nor an export can use them.
    """
    try:
        files = shards(folder, read_state(folder))[rank::world_size]
        found = (find_damage(file) or find_nonfinite(file) for file in files)
        return next((problem for problem in found if problem is not None), None)
    except CheckpointError as error:
        return error.reason
    except RunError as error:
        return str(error)


def shards(folder: Path, state: TrainState) -> list[Path]:
    return [folder / shard_name(rank) for rank in range(state.world_size)]


def check_settings(path: Path, then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raises RunError where settings that are not `allowed` to differ from the checkpoint's do, and where an
    allowed name is not that of a setting.

    A field of the model that the checkpoint does not record is newer than it: then its default holds.
    """
    then = {**{name: value for name, value in _model_defaults().items() if name in now}, **then}
    check_allowed_names(allowed, {*then, *now})
    names = sorted({*then, *now}.difference(allowed))
    refused = [name for name in names if then.get(name) != now.get(name)]
    if refused:
        lines = [f"{name}: {_brief(then.get(name))} then, {_brief(now.get(name))} now" for name in refused]
        flags = " ".join(f"--allow-change '{name}'" for name in refused)
        other_model = any(name.startswith(_OF_THE_MODEL) and name != WEIGHTS for name in refused)
        hint = f"\n{fine_tuning_hint(path)}" if other_model else ""
        raise RunError(
            f"checkpoint {path} is of another training:\n  " + "\n  ".join(lines) + "\n"
            "Change it back to continue, or train anew with another --run-dir; where it is meant: "
            f"{flags}{hint}"
        )


def _model_defaults() -> dict[str, Any]:
    """The defaults of the model's fields, by the names of their settings."""
    found = {
        f"model.overrides.{field.name}": field.default
        for field in fields(UniFormerV2Config)
        if field.default is not MISSING
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def fine_tuning_hint(checkpoint: Path) -> str:
    """How to train another model from the weights of a checkpoint, for a message."""
    return (
        "To train with other classes, resolution or form from its weights: `python launch/export.py "
        f"{checkpoint} --out FILE`, and model.weights=FILE with another --run-dir"
    )


def _brief(value: Any) -> str:
    if isinstance(value, dict) and "file" in value:
        digest = value.get("sha256")
        return f"{value['file']}" + (f" (sha256 {digest[:12]}...)" if isinstance(digest, str) else "")
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]} ... {text[-15:]}"


def check_allowed_names(allowed: Sequence[str], known: Iterable[str]) -> None:
    """Raises RunError for a name that no setting has; the message suggests the nearest."""
    names = sorted(known)
    for name in allowed:
        if name in names:
            continue
        near = [known for known in names if known.split(" (")[0] == name or known.endswith(f".{name}")]
        near = near or difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {' or '.join(repr(each) for each in near)}?" if near else ""
        raise RunError(
            f"--allow-change '{name}': no setting that a checkpoint keeps has this name; "
            f"{hint or 'allowed: the names that a refusal gives'}"
        )
