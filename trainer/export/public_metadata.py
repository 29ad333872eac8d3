"""The metadata of an exported model, without private addresses and paths."""

from typing import Any

from trainer.export.export_source import ExportSource
from trainer.secrets import redacted
from trainer.system.files import map_leaves

_PRIVATE = ("tracking", "run")  # addresses and folders of the training machines


def describe_model(source: ExportSource) -> dict[str, Any]:
    """The class names and the preprocessing, which a user of the logits needs, and the model's origin."""
    weights = source.weights
    return {
        "name": source.name,
        "class_names": list(weights.class_names),
        "preprocessing": weights.preprocessing,
        "step": source.step,
    }


def public_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe without addresses and with only the last part of each path."""
    public = {name: value for name, value in recipe.items() if name not in _PRIVATE}
    return map_leaves(public, _without_folders)


def _without_folders(value: Any) -> Any:
    return redacted(value.rstrip("/").rpartition("/")[2]) if isinstance(value, str) else value
