"""The shards of a checkpoint: one safetensors file per rank, with a checksum file beside it.

A shard holds one 1-D tensor per dtype. Its header lists the pieces of the training state in this tensor, in
order. To load, each rank needs all headers but only its own values, so any number of ranks can load a
checkpoint. Nothing is pickled. `sha256sum -c *.sha256` checks a checkpoint by hand.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from models.weights.files import count_not_finite, format_list
from models.weights.safetensors_header import read_header, shorten
from pipelines.atomic_file import flush
from trainer.checkpoint.tensor_file import write_tensors
from trainer.engine.state_shards import StateShard
from trainer.errors import RunError

_HASHED_AT_ONCE = 2**22  # bytes
_NUMBERS_AT_ONCE = 2**24  # numbers
_MAX_CHECKSUM = 1000  # characters that are read of a checksum file

Count = Annotated[int, Field(strict=True, ge=0, le=2**62)]
_PIECES = TypeAdapter(list[tuple[str, Count, Count, str, tuple[Count, ...]]])
"""Of a shard's header: key, start, number of elements, dtype and the tensor's shape of each piece."""


class Snapshot:
    """A copy of pieces of the state in host memory. The buffers are allocated once and reused."""

    def __init__(self, pieces: list[StateShard]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: str(piece.values.dtype))
        self._on_gpu = any(piece.values.is_cuda for piece in pieces)
        counts: dict[torch.dtype, int] = {}
        for piece in self._pieces:
            counts[piece.values.dtype] = counts.get(piece.values.dtype, 0) + piece.count
        self._buffers = {
            kind: torch.empty(count, dtype=kind, pin_memory=self._on_gpu) for kind, count in counts.items()
        }

    @property
    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def capture(self) -> None:
        """Copy the current values of the pieces to the buffers."""
        for piece, copy in self._copies():
            copy.copy_(piece.values, non_blocking=True)
        if self._on_gpu:
            torch.cuda.synchronize()

    def write(self, path: Path) -> None:
        """Write the shard and its checksum file, and flush both to the disk.

        Raises OSError, or RunError for values that are not finite.
        """
        held = []
        for piece, copy in self._copies():
            if any(map(count_not_finite, copy.split(_NUMBERS_AT_ONCE))):
                raise RunError(f"{piece.key} holds numbers that are not finite")
            held.append([piece.key, piece.start, piece.count, dtype_name(copy.dtype), piece.shape])
        tensors = {dtype_name(kind): buffer for kind, buffer in self._buffers.items()}
        write_tensors(path, tensors, {"pieces": json.dumps(held)})
        write_checksum(path)

    def _copies(self) -> Iterator[tuple[StateShard, Tensor]]:
        """Each piece with its place in a buffer."""
        ends = dict.fromkeys(self._buffers, 0)
        for piece in self._pieces:
            kind = piece.values.dtype
            yield piece, self._buffers[kind].narrow(0, ends[kind], piece.count)
            ends[kind] += piece.count


def write_checksum(path: Path) -> None:
    """Flush a file to the disk and write its checksum file."""
    flush(path)
    beside = _checksum_path(path)
    beside.write_text(_checksum_line(path), encoding="ascii")
    flush(beside)


def find_damage(path: Path) -> str | None:
    """The reason why a file does not match its checksum, or None."""
    try:
        if not path.is_file():
            return f"{path.name} is missing"
        beside = _checksum_path(path)
        if not beside.is_file():
            return f"{path.name} cannot be checked: {beside.name} is missing"
        with beside.open(encoding="ascii") as file:
            expected = file.read(_MAX_CHECKSUM)
        found = _checksum_line(path)
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be checked ({error})"
    return None if found == expected else f"{path.name} is damaged: its checksum does not fit"


@dataclass(frozen=True)
class StoredPiece:
    """The position of a piece in a shard."""

    file: Path
    kind: str
    """dtype, also the name of the tensor that holds the piece."""
    offset: int
    """Index of its first element in that tensor."""
    start: int
    """Index of its first element in the flattened tensor of the state."""
    count: int
    """Number of elements."""
    shape: tuple[int, ...]
    """Shape of the tensor of the state."""


Index = dict[str, list[StoredPiece]]


def find_nonfinite(path: Path) -> str | None:
    """A message that names the tensors of a shard with NaN or infinity, or None.

    Raises RunError where the shard cannot be read.
    """
    index = read_index([path])
    reader = ShardReader(index)
    bad = []
    for key, parts in index.items():
        every = (values for stored in parts for values in reader.parts(stored))
        if count := sum(map(count_not_finite, every)):
            of = sum(stored.count for stored in parts)
            bad.append(f"{key.removeprefix('weight/')}: {count:,} of {of:,} values")
    return f"it holds numbers that are not finite in {format_list(bad)}" if bad else None


def read_index(paths: Iterable[Path]) -> Index:
    """The pieces of all these shards, from their headers. Raises RunError for an unreadable file."""
    index: Index = {}
    for path in paths:
        ends: dict[str, int] = {}
        with _errors_naming(path):
            header = read_header(path)
            for key, start, count, kind, shape in _PIECES.validate_json(
                header.metadata["pieces"], strict=True
            ):
                if start + count > math.prod(shape):
                    raise ValueError(f"a piece of {shorten(key)} lies outside its tensor")
                stored = StoredPiece(path, kind, ends.get(kind, 0), start, count, shape)
                index.setdefault(key, []).append(stored)
                ends[kind] = ends.get(kind, 0) + count
            sizes = {
                name: shape for name, (dtype, shape) in header.tensors.items() if name == dtype_name(dtype)
            }
            if sizes.keys() != header.tensors.keys() or sizes != {k: (end,) for k, end in ends.items()}:
                raise ValueError("its pieces do not match its tensors")
    return index


@contextmanager
def _errors_naming(path: Path) -> Iterator[None]:
    """Turns an error in reading a shard into a RunError that names the file."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{path.name} cannot be read ({error or repr(error)})") from error


class ShardReader:
    """Reads parts of tensors from the shards of a checkpoint. index: of all shards."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: dict[Path, Any] = {}

    def fill(self, piece: StateShard) -> None:
        """Copy the stored values into the piece.

        Raises RunError when the checkpoint lacks the tensor or a part of it, when the shape differs, or when
        a shard cannot be read.
        """
        stored = self.index.get(piece.key)
        if stored is None:
            raise RunError(f"the checkpoint holds no {piece.key}: it is of another model")
        if stored[0].shape != piece.shape:
            raise RunError(
                f"the checkpoint's {piece.key} has the shape {list(stored[0].shape)}, the model's "
                f"{list(piece.shape)}: it is of another model. To start from its weights, export "
                "them with launch/export.py and name that file in model.weights"
            )
        filled = 0
        for start, part in self._overlaps(stored, piece.start, piece.start + piece.count):
            if start - piece.start != filled:
                break
            piece.values.narrow(0, filled, part.numel()).copy_(part)
            filled += part.numel()
        if filled != piece.count:
            raise RunError(f"the checkpoint holds only {filled} of {piece.count} elements of {piece.key}")

    def whole(self, key: str) -> Tensor:
        """A full tensor in its stored dtype. Raises RunError where a part is missing."""
        first = self.index[key][0]
        count = math.prod(first.shape)
        held = sum(part.count for part in self.index[key])
        if held != count:  # before memory is allocated
            only = "only " if held < count else ""
            raise RunError(f"the checkpoint holds {only}{held} of {count} elements of {key}")
        kind = getattr(torch, first.kind)
        piece = StateShard(key, 0, torch.empty(count, dtype=kind), first.shape, replicated=False)
        self.fill(piece)
        return piece.values.view(first.shape)

    def parts(self, stored: StoredPiece) -> Iterator[Tensor]:
        """The values of a piece, in blocks."""
        for begin in range(0, stored.count, _NUMBERS_AT_ONCE):
            end = min(begin + _NUMBERS_AT_ONCE, stored.count)
            with _errors_naming(stored.file):
                yield self._file(stored.file).get_slice(stored.kind)[
                    stored.offset + begin : stored.offset + end
                ]

    def _overlaps(self, stored: list[StoredPiece], begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        for part in sorted(stored, key=lambda part: part.start):
            first, last = max(begin, part.start), min(end, part.start + part.count)
            if first < last:
                offset = part.offset + first - part.start
                with _errors_naming(part.file):
                    values = self._file(part.file).get_slice(part.kind)[offset : offset + last - first]
                yield first, values

    def _file(self, path: Path) -> Any:
        from safetensors import safe_open

        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt").__enter__()
        return self._open[path]


def dtype_name(kind: torch.dtype) -> str:
    """Such as `float32`."""
    return str(kind).removeprefix("torch.")


def _checksum_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _checksum_line(path: Path) -> str:
    """As `sha256sum` writes it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return f"{digest.hexdigest()}  {path.name}\n"
