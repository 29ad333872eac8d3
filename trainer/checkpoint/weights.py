"""`weights.safetensors`: the trained weights with the metadata that using them needs. Nothing is pickled.

The file's metadata holds, as JSON: the model's configuration, the class names, the preprocessing, the recipe.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import ModelError, UniFormerV2, UniFormerV2Config
from models.weights.files import StoredWeights, count_not_finite, format_list, open_safetensors
from models.weights.safetensors_header import WeightFileError, shorten
from pipelines.atomic_file import atomic_file
from trainer.checkpoint.metadata import check_is_no_shard
from trainer.checkpoint.tensor_file import write_tensors
from trainer.errors import RunError

FORMAT = "1"

_DESCRIPTION: dict[str, type] = {"model": dict, "class_names": list, "preprocessing": dict, "recipe": dict}
_KINDS: dict[type, str] = {dict: "a mapping of names to values", list: "a list"}


@dataclass(frozen=True)
class SavedWeights:
    """A model in evaluation mode with its metadata, read from a weights file."""

    model: UniFormerV2
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    recipe: dict[str, Any]
    step: int | None = None
    """Step after which the weights were saved; None where the source does not record it."""


def save_weights(
    path: Path,
    state: dict[str, Tensor],
    description: dict[str, Any],
) -> None:
    """Write the file atomically.

    description: `model` (the fields of its configuration), `class_names`, `preprocessing` and `recipe`.
    Raises RunError where the file cannot be written.
    """
    metadata = {"format_version": FORMAT, **{name: json.dumps(value) for name, value in description.items()}}
    try:
        with atomic_file(path, sync=True) as partial:
            write_tensors(partial, state, metadata)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error


def check_finite(tensors: Mapping[str, Tensor], owner: str) -> None:
    """Raises RunError for NaN or infinity among the values. owner: first word of the message."""
    bad = [
        f"{name}: {count:,} of {tensor.numel():,} values"
        for name, tensor in tensors.items()
        if (count := count_not_finite(tensor))
    ]
    if bad:
        raise RunError(f"{owner} holds numbers that are not finite in {format_list(bad)}")


@dataclass(frozen=True)
class DescribedFile:
    """The header of a weights file of this program. No tensor has been read."""

    stored: StoredWeights
    description: dict[str, Any]
    """`model`, `class_names`, `preprocessing` and `recipe`."""
    model: UniFormerV2
    """On the meta device."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.description["class_names"])


def open_described(path: Path) -> DescribedFile:
    """Read the header of a file of `save_weights`.

    Raises RunError when the file is missing, is no safetensors file, was not written by `save_weights`, or
    has other tensors than its model.
    """
    try:
        stored = open_safetensors(path)
    except WeightFileError as error:
        raise RunError(f"{path} cannot be read as weights: it {error}") from error
    if stored.metadata.get("format_version") != FORMAT:
        check_is_no_shard(path)
        raise RunError(f"{path} holds tensors, but no model description of this program's format {FORMAT}")
    try:
        description = {
            name: _parsed(name, stored.metadata) for name in _DESCRIPTION if name in stored.metadata
        }
        return DescribedFile(stored, description, described_model(description, stored.shapes))
    except ModelError as error:
        raise RunError(f"{path} cannot be read as weights: {error}") from error


def load_weights(path: Path, *, finite: bool = True) -> SavedWeights:
    """Rebuild the model from the file. finite: whether NaN or infinity is an error.

    Raises RunError as `open_described` does, before any tensor is read, and for a tensor that cannot be read.
    """
    found = open_described(path)
    model = found.model.to_empty(device="cpu")
    try:
        model.load_state_dict(found.stored.read(found.stored.shapes, finite=finite))
    except ModelError as error:
        raise RunError(f"{path} cannot be read as weights: {error}") from error
    return SavedWeights(
        model.eval(),
        found.class_names,
        found.description["preprocessing"],
        found.description["recipe"],
    )


def _parsed(name: str, metadata: dict[str, str]) -> Any:
    try:
        return json.loads(metadata[name])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its {name} is no JSON ({error})") from error


def described_config(description: dict[str, Any]) -> UniFormerV2Config:
    """The described model's configuration. Raises ModelError where the description is incomplete or wrong."""
    for part, kind in _DESCRIPTION.items():
        if part not in description:
            raise ModelError(f"its description has no {part}")
        if not isinstance(description[part], kind):
            raise ModelError(f"its {part} is not {_KINDS[kind]}")
    if not all(isinstance(text, str) for text in description["class_names"]):
        raise ModelError("its class_names are not all text")
    fields = description["model"]
    known = {field.name: field for field in dataclasses.fields(UniFormerV2Config)}
    for name in fields.keys() - known:
        raise ModelError(f"the model's field {shorten(name)} is not known")
    for name, field in known.items():
        if name not in fields and field.default is dataclasses.MISSING:
            raise ModelError(f"the model's field {name} is missing")
    return UniFormerV2Config(**fields)


def described_model(description: dict[str, Any], shapes: Mapping[str, Tensor]) -> UniFormerV2:
    """The described model on the meta device, without values.

    shapes: its tensors, of which only names, shapes and dtypes are used. Raises ModelError as
    `described_config`, and where the tensors do not fit the model.
    """
    with torch.device("meta"):
        model = UniFormerV2(described_config(description))
    problems = []
    for name, own in model.state_dict().items():
        found = shapes.get(name)
        if found is None:
            problems.append(f"missing {name}")
        elif found.shape != own.shape:
            problems.append(f"{name} has shape {shorten(tuple(found.shape))}, expected is {tuple(own.shape)}")
        elif found.is_floating_point() != own.is_floating_point():
            problems.append(f"{name} holds {str(found.dtype).removeprefix('torch.')}")
    problems += [f"unexpected {shorten(name)}" for name in shapes.keys() - model.state_dict()]
    if problems:
        raise ModelError(f"the tensors do not fit the model they describe: {format_list(problems)}")
    return model
