"""A finished run that is started again: it is only evaluated, and keeps its events and results."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.metadata import TrainState
from trainer.config.schema import Recipe
from trainer.monitoring.metric_names import VAL
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import read_json


@dataclass(frozen=True)
class Reevaluation:
    """An evaluation of a finished run."""

    metrics: str
    """Prefix of its MLflow metrics: `val/` if manifest and views are those of the run's own evaluation."""
    settings: dict[str, Any]
    """Fields of its event."""


def is_finished(folder: RunDir, found: Path, state: TrainState, total_steps: int) -> bool:
    """Whether the run finished and wrote its results at the checkpoint that it would resume from."""
    own = found.absolute().parent == folder.checkpoints.absolute()
    if not own or state.step < total_steps or not folder.weights.is_file():
        return False
    return read_json(folder.summary).get("steps") == state.step


def choose_reevaluation(recipe: Recipe, state: TrainState) -> Reevaluation:
    """Metric prefix and settings of the evaluation of this start."""
    evaluation, val = recipe.evaluation, str(recipe.data.val)
    changed = changed_settings(recipe, state)
    views = f"{evaluation.clips}x{evaluation.crops}"
    if "data.val" in changed:
        # The folder's name keeps the metrics of data/a/val.arrow and data/b/val.arrow apart.
        name = "_".join(filter(None, (recipe.data.val.parent.name, recipe.data.val.stem)))
        metrics = f"manifest_{re.sub(r'[^A-Za-z0-9_-]', '_', name)}_{views}/"
    else:
        other_views = {"evaluation.clips", "evaluation.crops"} & changed.keys()
        metrics = f"val_{views}/" if other_views else VAL
    return Reevaluation(
        metrics, {"clips": evaluation.clips, "crops": evaluation.crops, "val": val, "changed": changed}
    )


def changed_settings(recipe: Recipe, state: TrainState) -> dict[str, list[Any]]:
    """Recipe fields that changed since the checkpoint was saved: [old, new] by name."""
    then = state.description.get("recipe")
    now = json.loads(recipe.model_dump_json())
    return dict(_changed(then, now, "")) if isinstance(then, dict) else {}


def _changed(then: dict[str, Any], now: dict[str, Any], prefix: str) -> list[tuple[str, list[Any]]]:
    """Compares the fields that both recipes have: another version of the program may have others."""
    found = []
    for name in sorted(then.keys() & now):
        before, after = then[name], now[name]
        if isinstance(before, dict) and isinstance(after, dict):
            found += _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, [before, after]))
    return found
