"""`weights.safetensors`: the trained weights with all that is needed to use them, and no pickle.

The file's metadata holds, as JSON: the model's configuration, the class names, the preprocessing, the recipe.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models import UniFormerV2, UniFormerV2Config
from trainer import RunError
from trainer.tensor_file import flush, write_tensors

FORMAT = "1"


@dataclass(frozen=True)
class Weights:
    """A model that was read from a weights file, in evaluation mode, and what belongs to it."""

    model: UniFormerV2
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    recipe: dict[str, Any]


def save_weights(
    path: Path,
    state: dict[str, Tensor],
    description: dict[str, Any],
) -> None:
    """Write the file whole or not at all. description: `model`, the fields of its configuration,
    `class_names`, `preprocessing` and `recipe`. Raises RunError where it cannot be written.
    """
    metadata = {"format_version": FORMAT, **{name: json.dumps(value) for name, value in description.items()}}
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_tensors(partial, state, metadata)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def load_weights(path: Path) -> Weights:
    """Rebuild the model from the file alone.

    Raises RunError when the file is missing, no safetensors file, or was not written by `save_weights`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read as weights: {error}") from error
    if metadata.get("format_version") != FORMAT:
        raise RunError(
            f"{path} holds tensors, but not a model's description of this program's format {FORMAT}"
        )
    model = UniFormerV2(UniFormerV2Config(**json.loads(metadata["model"])))
    model.load_state_dict(state)
    return Weights(
        model.eval(),
        tuple(json.loads(metadata["class_names"])),
        json.loads(metadata["preprocessing"]),
        json.loads(metadata["recipe"]),
    )
