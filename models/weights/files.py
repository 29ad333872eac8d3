"""Weights in a file or in memory: what they are called and shaped first, then those that are wanted.

Nothing that a file may hold is run. What its tensors are is known before any of them is read, so a file
cannot ask for more memory than the model has.
"""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import ModelError
from models.weights.safetensors_header import (
    WeightFileError,
    first_bytes,
    guess_content,
    read_header,
    shorten,
)

WeightSource = str | Path | Mapping[str, Any]

_NESTED_UNDER = ("model_state", "state_dict", "module", "model")
_MOST_NAMED = 10
_NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")


@dataclass(frozen=True)
class StoredWeights:
    """Tensors that can be read.

    origin: what to call them in messages. shapes: every tensor on the meta device: its name, shape and dtype
    without its values. metadata: the texts in a safetensors file's header.
    """

    origin: str
    shapes: dict[str, Tensor]
    _read: Callable[[list[str]], dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, Tensor]:
        """The named tensors in float32, on the CPU; integers and truth values as they are.

        Raises ModelError for a tensor that cannot be read, and, unless `finite` is false, with its name and
        the number of such values, for one that holds NaN, infinity, or more than float32 can hold.
        """
        wanted = list(names)
        try:
            found = self._read(wanted)
        except WeightFileError as error:
            raise ModelError(f"{self.origin} {error}") from error
        tensors, problems = {}, []
        for name in wanted:
            tensor = found[name].detach()
            if tensor.is_floating_point():
                tensor = tensor.float()
                bad = count_not_finite(tensor)
                if bad and finite:
                    problems.append(f"{shorten(name)}: {bad:,} of {tensor.numel():,} values")
            tensors[name] = tensor
        if problems:
            raise ModelError(
                f"{self.origin} holds numbers that are not finite (NaN or infinity) in "
                + listed(problems)
                + "; the file is damaged, or the training that wrote it went wrong"
            )
        return tensors


def open_weights(source: WeightSource) -> StoredWeights:
    """The weights in a `.safetensors` file, a `torch.save` file or a mapping.

    A dict nested under `model_state` or the like is unpacked. `torch.load` runs with `weights_only=True`: a
    checkpoint cannot execute code. Raises `ModelError` for a file that is missing, no ordinary file, damaged
    or holds no tensors.
    """
    if isinstance(source, Mapping):
        return _of_tensors(source, "the given state dict")
    path = Path(source)
    try:
        begin, size = first_bytes(path, 9)
        has_header = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < size
        if has_header or path.suffix == ".safetensors":
            return open_safetensors(path)
        return _of_tensors(_unpickled(path, size), str(path))
    except WeightFileError as error:
        raise ModelError(f"{shorten(str(path), 1000)} {error}") from error


def read_state(source: WeightSource) -> dict[str, Tensor]:
    """All tensors of a file or a mapping, as `StoredWeights.read` gives them. Raises ModelError."""
    weights = open_weights(source)
    return weights.read(weights.shapes)


def count_not_finite(values: Tensor) -> int:
    """How many of the values are NaN or infinite."""
    if not values.is_floating_point():
        return 0
    # A sum is many times faster than a look at each, and is finite only where all are.
    if values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())


def listed(items: list[str]) -> str:
    """At most ten of them, and how many more there are."""
    more = len(items) - _MOST_NAMED
    return ", ".join(items[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def open_safetensors(path: Path) -> StoredWeights:
    """The tensors of a safetensors file. Raises FileError, whose words follow the file's name."""
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    shapes = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in header.tensors.items()
    }

    def read(names: list[str]) -> dict[str, Tensor]:
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, RuntimeError, ValueError, MemoryError) as error:
            raise WeightFileError(f"cannot be read as safetensors: {shorten(str(error), 500)}") from error

    if not shapes:
        raise WeightFileError("holds no tensors")
    return StoredWeights(str(path), shapes, read, header.metadata)


def _unpickled(path: Path, size: int) -> object:
    is_zip = first_bytes(path, 4)[0] == b"PK\3\4"  # as torch.load tells its two formats apart
    if is_zip:
        _check_archive(path, size)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # a damaged pickle can make the unpickler raise whatever it likes
        raise WeightFileError(
            f"cannot be read as a file of weights: {_reason(error)}{guess_content(path)}"
        ) from error


def _reason(error: Exception) -> str:
    """Why the unpickler refused, without torch's advice to let it run what the file holds."""
    text = str(error)
    refused = _NOT_ALLOWED.search(text)
    if refused:
        return (
            f"it holds {shorten(refused[1])}, which is no tensor and could run code; write its tensors "
            "alone, with safetensors"
        )
    if isinstance(error, pickle.UnpicklingError) or not any(letter.isalpha() for letter in text):
        return "it is no file of torch.save, or is damaged"
    return shorten(text.split("\n")[0], 300)


def _check_archive(path: Path, size: int) -> None:
    """torch.save stores without compression: what unpacks to more than the file has is no file of it."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, NotImplementedError) as error:
        raise WeightFileError(f"cannot be read as a file of weights: {shorten(str(error), 300)}") from error
    if sum(member.file_size for member in members) > size:
        raise WeightFileError("cannot be read as a file of weights: its parts are larger than the file")
    if any("/code/" in member.filename for member in members):
        raise WeightFileError(
            "is a program (TorchScript), as OpenAI publishes CLIP, and is not run: load it where it is "
            "trusted, `torch.jit.load(PATH).state_dict()`, and write that with safetensors"
        )


def _of_tensors(loaded: object, origin: str) -> StoredWeights:
    for key in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{origin} holds a {type(loaded).__name__}, not a dict of tensors")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        names = listed([shorten(str(name)) for name in loaded])
        raise ModelError(f"{origin} holds no tensors" + (f"; its entries are {names}" if names else ""))
    shapes = {}
    for name, tensor in tensors.items():
        _check_stored(name, tensor, origin)
        shapes[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return StoredWeights(origin, shapes, lambda names: {name: tensors[name] for name in names})


def _check_stored(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ModelError(
            f"{origin}: {shorten(name)} is sparse, quantised or without values; save it as plain"
        )
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > stored:
        raise ModelError(
            f"{origin}: {shorten(name)} of shape {shorten(tuple(tensor.shape))} would need {needed:,} bytes, "
            f"{stored:,} are stored"
        )
