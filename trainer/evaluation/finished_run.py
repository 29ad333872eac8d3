"""A finished run that is started again: it is only evaluated; its events and results stay."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.metadata import TrainState
from trainer.config.schema import Recipe
from trainer.monitoring.metric_names import VAL
from trainer.monitoring.run_dir import RunDir


@dataclass(frozen=True)
class Reevaluation:
    """An evaluation of a finished run.

    metrics: prefix of its MLflow metrics: `val/` if manifest and views are those of the training's
    evaluation. settings: fields of its event.
    """

    metrics: str
    settings: dict[str, Any]


def is_finished(folder: RunDir, found: Path, state: TrainState, total_steps: int) -> bool:
    """Whether the run was finished, with its results written, at the checkpoint that it would resume from."""
    own = found.absolute().parent == folder.checkpoints.absolute()
    if not own or state.step < total_steps or not folder.weights.is_file():
        return False
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("steps") == state.step


def choose_reevaluation(recipe: Recipe, state: TrainState) -> Reevaluation:
    """Settings and metric prefix of this start's evaluation."""
    evaluation, val = recipe.evaluation, str(recipe.data.val)
    changed = changed_settings(recipe, state)
    views = f"{evaluation.clips}x{evaluation.crops}"
    if "data.val" in changed:
        # With the folder's name, so that data/a/val.arrow and data/b/val.arrow have different metrics.
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
    """Compares the fields of both recipes only: another version of the program may have other fields."""
    found = []
    for name in sorted(then.keys() & now):
        before, after = then[name], now[name]
        if isinstance(before, dict) and isinstance(after, dict):
            found += _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, [before, after]))
    return found
