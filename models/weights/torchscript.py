"""Reads the tensors of a TorchScript archive, as OpenAI publishes CLIP, without executing it.

The archive is a zip of code, raw tensors (`data/0`, ...) and a pickle that describes the objects with these
tensors. The code is ignored. The pickle is not loaded: `pickletools` lists its operations, and the few that
build a TorchScript module act on plain data here. Any other operation is refused.
"""

import math
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.weights.safetensors_header import WeightFileError, shorten

_DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_MAX_PICKLE = 64 * 2**20
_MAX_TENSORS = 100_000
_MAX_OBJECTS = 100_000  # attributes that are objects; one object may be that of several
_MAX_DEPTH = 64
_MAX_NAME = 1000  # characters
_MAX_NUMBER = 2**40  # values of a storage, and sizes, strides and offsets
_MAX_DIMENSIONS = 16
_OF_ZIPFILE = (OSError, EOFError, ValueError, LookupError, RuntimeError)
"""What `zipfile` raises for damaged archives; NotImplementedError is a RuntimeError."""
_NOT_READ = "cannot be read as a TorchScript archive"


@dataclass(frozen=True)
class _Global:
    """The name of a class or function, which is not imported."""

    name: str


@dataclass
class _Object:
    """An instance of any class: its attributes."""

    fields: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Storage:
    """The values of one or several tensors."""

    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True)
class ScriptTensor:
    """A tensor in an archive: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def on_meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.storage.dtype, device="meta")

    def is_inside(self) -> bool:
        """Whether all its elements are in the storage, each once."""
        numbers = (self.offset, *self.shape, *self.stride)
        if not all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers):
            return False
        if (
            len(self.shape) > _MAX_DIMENSIONS
            or len(self.shape) != len(self.stride)
            or not 0 < math.prod(self.shape) <= self.storage.count
        ):
            return False
        steps = zip(self.shape, self.stride, strict=True)
        return self.offset + sum((size - 1) * step for size, step in steps) < self.storage.count


def is_script(names: list[str]) -> bool:
    """Whether an archive with members of these names is a TorchScript one."""
    return any("/code/" in name for name in names) and any(name.endswith("/constants.pkl") for name in names)


def script_tensors(path: Path) -> dict[str, ScriptTensor]:
    """The tensors of an archive by the names of a state dict. Raises WeightFileError."""
    with _opened(path) as archive:
        member = _member(archive, "data.pkl")
        if member.file_size > _MAX_PICKLE:
            raise WeightFileError(
                f"{_NOT_READ}: the description of its objects is {member.file_size:,} bytes"
            )
        described = archive.read(member)
    try:
        found = dict(_named(_built(described), "", 0, iter(range(_MAX_OBJECTS))))
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # the pickle is damaged
        raise WeightFileError(f"{_NOT_READ}: {shorten(str(error), 300)}") from error
    if not found:
        raise WeightFileError("is a TorchScript archive without tensors")
    for name, tensor in found.items():
        if not tensor.is_inside():
            raise WeightFileError(f"{_NOT_READ}: {shorten(name)} is larger than its values")
    return found


def read_script_tensors(path: Path, wanted: dict[str, ScriptTensor]) -> dict[str, Tensor]:
    """The values of these tensors. Raises WeightFileError."""
    read = {}
    with _opened(path) as archive:
        for name, tensor in wanted.items():
            storage = tensor.storage
            member = _member(archive, f"data/{storage.key}")
            expected = storage.count * storage.dtype.itemsize
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != expected:
                raise WeightFileError(
                    f"{_NOT_READ}: the values of {shorten(name)} are not {expected:,} bytes"
                )
            values = torch.frombuffer(bytearray(archive.read(member)), dtype=storage.dtype)
            read[name] = values.as_strided(tensor.shape, tensor.stride, tensor.offset).clone()
    return read


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; errors of reading it become WeightFileErrors."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except WeightFileError:
        raise
    except (zipfile.BadZipFile, zlib.error, *_OF_ZIPFILE) as error:
        raise WeightFileError(f"{_NOT_READ}: {shorten(str(error), 300)}") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    """The member of this name in the archive's only folder."""
    found = [member for member in archive.infolist() if member.filename.partition("/")[2] == name]
    if len(found) != 1:
        raise WeightFileError(f"{_NOT_READ}: it holds {shorten(name)} {len(found)} times")
    return found[0]


def _named(value: Any, name: str, depth: int, left: Iterator[int]) -> Iterator[tuple[str, ScriptTensor]]:
    """The tensors in an object's attributes, and in those of its attributes, with dotted names.

    left: has an item for each object that may still be visited.
    """
    if depth > _MAX_DEPTH:
        raise ValueError("its objects are nested too deeply")
    if len(name) > _MAX_NAME:
        raise ValueError(f"a name has more than {_MAX_NAME:,} characters")
    if next(left, None) is None:
        raise ValueError(f"it has more than {_MAX_OBJECTS:,} objects")
    if isinstance(value, ScriptTensor):
        yield name, value
    elif isinstance(value, _Object):
        for key, part in value.fields.items():
            if isinstance(part, ScriptTensor | _Object):
                yield from _named(part, f"{name}.{key}" if name else str(key), depth + 1, left)


def _built(described: bytes) -> Any:
    """The object that the operations of a pickle describe, as `_Object`s, tensors and plain data."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    tensors = 0
    argument: Any
    for operation, argument, _ in pickletools.genops(described):
        name = operation.name
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in _FROM_MARK:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            if name == "TUPLE":
                stack.append(tuple(items))
            elif name == "SETITEMS":
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            else:
                stack[-1].extend(items)
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = stack[len(stack) - count :]
            del stack[len(stack) - count :]
            stack.append(tuple(items))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(_Global(argument))
        elif name == "SETITEM":
            item = stack.pop()
            key = stack.pop()
            stack[-1][key] = item
        elif name == "APPEND":
            item = stack.pop()
            stack[-1].append(item)
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "NEWOBJ":
            del stack[-2:]
            stack.append(_Object())
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(state, dict) and isinstance(stack[-1], _Object):
                stack[-1].fields.update(state)
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_reduced(stack.pop(), arguments))
            tensors += 1
            if tensors > _MAX_TENSORS:
                raise ValueError(f"it has more than {_MAX_TENSORS:,} tensors")
        elif name == "STOP":
            return stack.pop()
        elif name != "PROTO":
            raise ValueError(f"operation {name} has no place in it")
    raise ValueError("its description has no end")


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_FROM_MARK = {"TUPLE", "SETITEMS", "APPENDS"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _storage(identity: Any) -> _Storage:
    kind, stored, key, _, count = identity
    dtype = _DTYPES.get(stored.name) if kind == "storage" and isinstance(stored, _Global) else None
    if dtype is None or not isinstance(key, str) or type(count) is not int or count > _MAX_NUMBER:
        raise ValueError(f"it has values of an unknown kind, {shorten(stored)}")
    return _Storage(key, dtype, count)


def _reduced(function: Any, arguments: Any) -> Any:
    """A tensor, or an empty object for any other call, which is not made."""
    if function == _Global("torch._utils _rebuild_tensor_v2"):
        storage, offset, shape, stride = arguments[:4]
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor has no values")
        return ScriptTensor(storage, offset, tuple(shape), tuple(stride))
    return _Object()
