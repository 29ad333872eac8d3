"""A finished run that is started again: it is evaluated, and nothing of what was trained is rewritten."""

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
    """An evaluation of a run that has ended.

    metrics: what the names of its metrics begin with in MLflow: `val/` where it measures what the
    training's own evaluation measured. settings: what it measures with, for its event.
    """

    metrics: str
    settings: dict[str, Any]


def is_finished(folder: RunDir, found: Path, state: TrainState, total_steps: int) -> bool:
    """Whether a run has ended, with its results written, at the checkpoint that it would go on from."""
    own = found.absolute().parent == folder.checkpoints.absolute()
    if not own or state.step < total_steps or not folder.weights.is_file():
        return False
    try:
        summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(summary, dict) and summary.get("steps") == state.step


def choose_reevaluation(recipe: Recipe, state: TrainState) -> Reevaluation:
    """How this start evaluates, and how to tell it from the training's own evaluation."""
    evaluation, val = recipe.evaluation, str(recipe.data.val)
    changed = changed_settings(recipe, state)
    views = f"{evaluation.clips}x{evaluation.crops}"
    if "data.val" in changed:
        # With the folder: data/a/val.arrow and data/b/val.arrow are not to share a metric with `val_4x3/`.
        name = "_".join(filter(None, (recipe.data.val.parent.name, recipe.data.val.stem)))
        metrics = f"manifest_{re.sub(r'[^A-Za-z0-9_-]', '_', name)}_{views}/"
    else:
        other_views = {"evaluation.clips", "evaluation.crops"} & changed.keys()
        metrics = f"val_{views}/" if other_views else VAL
    return Reevaluation(
        metrics, {"clips": evaluation.clips, "crops": evaluation.crops, "val": val, "changed": changed}
    )


def changed_settings(recipe: Recipe, state: TrainState) -> dict[str, list[Any]]:
    """Settings that are others than when the checkpoint was saved: then, and now; by name."""
    then = state.description.get("recipe")
    now = json.loads(recipe.model_dump_json())
    return dict(_changed(then, now, "")) if isinstance(then, dict) else {}


def _changed(then: dict[str, Any], now: dict[str, Any], prefix: str) -> list[tuple[str, list[Any]]]:
    """Of the names that both have: another version of this program may have others."""
    found = []
    for name in sorted(then.keys() & now):
        before, after = then[name], now[name]
        if isinstance(before, dict) and isinstance(after, dict):
            found += _changed(before, after, f"{prefix}{name}.")
        elif before != after:
            found.append((prefix + name, [before, after]))
    return found
