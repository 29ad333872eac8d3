"""Reads weights from files and mappings: names and shapes first, then the requested tensors.

No code in a file is executed. Names, shapes and dtypes are known before a tensor is read, so a file cannot
make the program allocate more memory than the model needs.
"""

import logging
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
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
from models.weights.torchscript import is_script, read_script_tensors, script_tensors

WeightSource = str | Path | Mapping[str, Any]

_NESTED_UNDER = ("model_state", "state_dict", "module", "model")
_MAX_NAMED = 10
_NOT_READ = "cannot be read as a file of weights"
_DAMAGED = "it was not written by torch.save, or is damaged"
_NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")
_NO_MEMORY = re.compile(r"allocate memory|not enough memory", re.IGNORECASE)
_NEWER = re.compile(r"PyTorch file with version (\d+), but the maximum|Invalid protocol version: (\d+)")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of a file or mapping, which are read on request."""

    origin: str
    """Their name in messages."""
    shapes: dict[str, Tensor]
    """Every tensor by name, on the meta device: shape and dtype without values."""
    _read: Callable[[list[str]], dict[str, Tensor]]
    metadata: dict[str, str] = field(default_factory=dict)
    """The metadata in a safetensors file's header."""

    def read(self, names: Iterable[str], *, finite: bool = True) -> dict[str, Tensor]:
        """The named tensors on the CPU, floating-point ones in float32.

        Raises ModelError for a tensor that cannot be read and, if `finite`, for values that are not finite
        in float32, with the tensor's name and their number.
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
                f"{format_list(problems)}; the file is damaged, or the training that wrote it failed"
            )
        return tensors


def open_weights(source: WeightSource) -> StoredWeights:
    """The weights in a `.safetensors` file, a `torch.save` file, a TorchScript archive or a mapping.

    Dicts nested under keys such as `model_state` are unwrapped. No code in a file is executed: `torch.load`
    runs with `weights_only=True`, and of a TorchScript archive only the tensors are read. Raises
    `ModelError` for a file that is missing, not regular, damaged or without tensors.
    """
    if isinstance(source, Mapping):
        return _of_tensors(source, "the given state dict")
    path = Path(source)
    try:
        begin, size = first_bytes(path, 9)
        has_header = begin[8:] == b"{" and int.from_bytes(begin[:8], "little") < size
        if has_header or path.suffix == ".safetensors":
            return open_safetensors(path)
        if begin.startswith(b"PK\3\4") and is_script([member.filename for member in _members(path)]):
            return _open_script(path)
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
    # A sum is many times faster than a check of each value, and is finite only if all are.
    if values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).isfinite():
        return 0
    return values.numel() - int(values.isfinite().sum())


def format_list(items: Sequence[str]) -> str:
    """At most ten items, and the number of further ones."""
    more = len(items) - _MAX_NAMED
    return ", ".join(items[:_MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def format_problems(*columns: Sequence[str]) -> str:
    """At most ten problems, one per line, alternately from each column, and the number of further ones."""
    problems = [item for row in zip_longest(*columns) for item in row if item is not None]
    more = len(problems) - _MAX_NAMED
    return "".join(
        f"\n  {line}" for line in (*problems[:_MAX_NAMED], *([f"... and {more:,} more"] if more > 0 else []))
    )


def open_safetensors(path: Path) -> StoredWeights:
    """The tensors of a safetensors file; raises WeightFileError."""
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
    is_zip = first_bytes(path, 4)[0] == b"PK\3\4"  # torch.load distinguishes its two formats in the same way
    # torch.save does not compress.
    if is_zip and sum(member.file_size for member in _members(path)) > size:
        raise WeightFileError(f"{_NOT_READ}: its parts are larger than the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about pickles of other programs
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except Exception as error:  # a damaged pickle can make the unpickler raise any exception
        logger.debug("torch.load refuses %s: %s: %s", path, type(error).__name__, error)
        raise WeightFileError(f"{_NOT_READ}: {_reason(error)}{guess_content(path)}") from error


def _reason(error: Exception) -> str:
    """Why the unpickler refused. Torch's own text is about its code, or advises to run that of the file."""
    refused = _NOT_ALLOWED.search(str(error))
    if refused:
        return (
            f"it holds {shorten(refused[1])}, which is no tensor and could run code; save its tensors "
            "alone, with safetensors"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        return "there is not enough memory for the tensors that it declares"
    if newer := _NEWER.search(str(error)):
        return (
            f"it has version {newer[1] or newer[2]} of the format, which this PyTorch ({torch.__version__}) "
            "cannot read: update PyTorch, or save the tensors with safetensors"
        )
    return _DAMAGED


def _open_script(path: Path) -> StoredWeights:
    found = script_tensors(path)
    shapes = {name: tensor.on_meta() for name, tensor in found.items()}

    def read(names: list[str]) -> dict[str, Tensor]:
        return read_script_tensors(path, {name: found[name] for name in names})

    return StoredWeights(str(path), shapes, read)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except OSError as error:
        raise WeightFileError(f"{_NOT_READ}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, LookupError, NotImplementedError) as error:
        raise WeightFileError(f"{_NOT_READ}: it is a zip archive that is cut off or damaged") from error


def _of_tensors(loaded: object, origin: str) -> StoredWeights:
    for key in _NESTED_UNDER:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ModelError(f"{origin} holds a {type(loaded).__name__}, not a dict of tensors")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not tensors:
        names = format_list([shorten(str(name)) for name in loaded])
        raise ModelError(f"{origin} holds no tensors" + (f"; its entries are {names}" if names else ""))
    shapes = {}
    for name, tensor in tensors.items():
        _check_stored(name, tensor, origin)
        shapes[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return StoredWeights(origin, shapes, lambda names: {name: tensors[name] for name in names})


def _check_stored(name: str, tensor: Tensor, origin: str) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ModelError(
            f"{origin}: {shorten(name)} is sparse, quantised or without values; save it as a dense tensor"
        )
    needed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if needed > stored:
        raise ModelError(
            f"{origin}: {shorten(name)} of shape {shorten(tuple(tensor.shape))} would need {needed:,} bytes, "
            f"{stored:,} are stored"
        )
