"""Which weights a training began from: what was trained stays recorded as trained."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoint.metadata import WEIGHTS, TrainState, check_settled
from trainer.errors import RunError

Began = dict[str, Any] | None
"""`file`: the path that the recipe gave. `sha256`: of its content, None where that was not recorded."""


def began_from(weights: Path | None) -> Began:
    """What a checkpoint is to say of the weights that a training begins from; reads all of the file.

    Raises RunError where it cannot be read.
    """
    if weights is None:
        return None
    try:
        with weights.open("rb") as file:
            return {"file": str(weights), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise RunError(f"model.weights: {weights} cannot be read: {error.strerror or error}") from error


def recorded(state: TrainState) -> Began:
    """What a checkpoint says of them; earlier versions of this program kept the path alone, in the recipe."""
    if WEIGHTS in state.settled:
        found = state.settled[WEIGHTS]
        return found if isinstance(found, dict) and isinstance(found.get("file"), str) else None
    recipe = state.description.get("recipe")
    model = recipe.get("model") if isinstance(recipe, dict) else None
    file = model.get("image_weights") if isinstance(model, dict) else None
    return {"file": file, "sha256": None} if isinstance(file, str) else None


def began_so(then: Began, weights: Path | None) -> bool:
    """Whether a recipe names the weights that a training began from: the same path, or the same content.

    A file that is gone or was written anew since does not matter: going on does not read it.
    """
    if then is None or weights is None:
        return then is None and weights is None
    if then["file"] == str(weights):
        return True
    if then["sha256"] is None or not weights.is_file():
        return False
    found = began_from(weights)
    return found is not None and found["sha256"] == then["sha256"]


def check_unchanged(path: Path, state: TrainState, settled: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raises RunError where settings differ from those of the checkpoint at `path`, see `check_settled`; the
    weights that the training began from are compared as `began_so` does.
    """
    if WEIGHTS not in settled:
        check_settled(path, state.settled, settled, allowed)
        return
    then, named = recorded(state), settled[WEIGHTS]
    if began_so(then, None if named is None else Path(named["file"])):
        settled = {**settled, WEIGHTS: then}
    check_settled(path, {**state.settled, WEIGHTS: then}, settled, allowed)
