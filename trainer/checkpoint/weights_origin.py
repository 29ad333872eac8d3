"""The record of a training's starting weights, and its comparison when the training is resumed."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.metadata import WEIGHTS, TrainState, check_settings
from trainer.errors import RunError

WeightsOrigin = dict[str, Any] | None
"""`file`: path in the recipe. `sha256`: digest of the content; None where it was not recorded."""


def weights_origin_of(weights: Path | None) -> WeightsOrigin:
    """The record of a weights file, which is read to its end. Raises RunError where it cannot be read."""
    if weights is None:
        return None
    try:
        with weights.open("rb") as file:
            return {"file": str(weights), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise RunError(f"model.weights: {weights} cannot be read: {error.strerror or error}") from error


def recorded(state: TrainState) -> WeightsOrigin:
    """The record in a checkpoint. Earlier versions of this program recorded only the path, in the recipe."""
    if WEIGHTS in state.settings:
        found = state.settings[WEIGHTS]
        return found if isinstance(found, dict) and isinstance(found.get("file"), str) else None
    recipe = state.description.get("recipe")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    file = model.get("image_weights") if isinstance(model, dict) else None
    return {"file": file, "sha256": None} if isinstance(file, str) else None


def is_same_origin(then: WeightsOrigin, weights: Path | None) -> bool:
    """Whether a recipe names the starting weights of a training: the same path or the same content.

    The file may have been deleted or changed: a resumed training does not read it.
    """
    if then is None or weights is None:
        return then is None and weights is None
    if then["file"] == str(weights):
        return True
    if then["sha256"] is None or not weights.is_file():
        return False
    found = weights_origin_of(weights)
    return found is not None and found["sha256"] == then["sha256"]


def check_settings_unchanged(
    path: Path, state: TrainState, settings: dict[str, Any], allowed: Sequence[str]
) -> None:
    """Raises RunError where settings differ from those of the checkpoint at `path`, as `check_settings`. The
    starting weights are compared with `is_same_origin`.
    """
    if WEIGHTS not in settings:
        check_settings(path, state.settings, settings, allowed)
        return
    then, named = recorded(state), settings[WEIGHTS]
    if is_same_origin(then, None if named is None else Path(named["file"])):
        settings = {**settings, WEIGHTS: then}
    check_settings(path, {**state.settings, WEIGHTS: then}, settings, allowed)
