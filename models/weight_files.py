"""Reading a state dict from a file or from memory, without running anything that the file may hold."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import ModelError

WeightSource = str | Path | Mapping[str, Any]

_NESTED_UNDER = ("model_state", "state_dict", "module", "model")


def read_state(source: WeightSource) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, a `torch.save` file or a mapping, by name.

    A dict nested under `model_state` or the like is unpacked. `torch.load` runs with `weights_only=True`: a
    checkpoint cannot execute code. Raises `ModelError` for a file that is missing, damaged or holds no
    tensors.
    """
    if isinstance(source, Mapping):
        return _tensors_of(source, "the given state dict")
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"no weight file at {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as a file of weights: {error}") from error
    return _tensors_of(loaded, str(path))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def _tensors_of(loaded: object, origin: str) -> dict[str, Tensor]:
    for key in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{origin} holds a {type(loaded).__name__}, not a dict of tensors")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ModelError(f"{origin} holds no tensors")
    return tensors
