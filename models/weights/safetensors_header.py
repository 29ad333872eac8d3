"""Reads and checks the header of a safetensors file before any tensor is read.

The safetensors library makes most of these checks, but its messages lack the wrong tensor and a remedy, and
it allows headers of any size.
"""

import json
import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER = 2**24
"""Bytes; the header of 100,000 tensors is smaller."""
_MAX_DIMENSIONS = 8
_MAX_EXTENT = 2**40  # of one dimension
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WeightFileError(ValueError):
    """A file of weights cannot be read; the message follows the file's name."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """A valid header: all tensors are inside the file."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and shape by name."""
    metadata: dict[str, str]
    """The file's metadata."""


def first_bytes(path: Path, count: int) -> tuple[bytes, int]:
    """The first `count` bytes of a regular file, and its size; raises WeightFileError for other paths."""
    try:
        found = os.stat(path)
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFREG:
            hint = ": name a file in it, such as model.safetensors" if stat.S_ISDIR(kind) else ""
            raise WeightFileError(f"is {_KINDS.get(kind, 'no file')}, not a file of weights{hint}")
        # O_NONBLOCK: the file may have been replaced by a pipe, on which open would wait.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            return file.read(count), found.st_size
    except FileNotFoundError:
        raise WeightFileError("does not exist: no weight file at this path") from None
    except OSError as error:
        raise WeightFileError(f"cannot be read: {error.strerror}") from error
    except WeightFileError:
        raise
    except ValueError as error:  # NUL in the path
        raise WeightFileError(f"cannot be read: {error}") from error


def read_header(path: Path) -> SafetensorsHeader:
    """The header of a safetensors file; raises WeightFileError for other files and wrong headers."""
    begin, size = first_bytes(path, 8)
    if size < 8:
        raise WeightFileError(f"cannot be read as safetensors: it has {size} bytes")
    length = int.from_bytes(begin, "little")
    if length > min(size - 8, MAX_HEADER):
        raise WeightFileError(
            f"cannot be read as safetensors: it starts with a header length of {length:,} bytes; allowed are "
            f"{MAX_HEADER:,}, and the file has {size:,}{guess_content(path)}"
        )
    content = first_bytes(path, 8 + length)[0][8:]
    try:
        entries = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except WeightFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"cannot be read as safetensors: its header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise WeightFileError("cannot be read as safetensors: its header is not a mapping of names")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightFileError("cannot be read as safetensors: its metadata is not a mapping of strings")
    offsets: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in entries.items():
        dtype, shape, span = _read_entry(name, entry)
        tensors[name] = (dtype, shape)
        offsets.append((*span, name))
    _check_offsets(offsets, size - 8 - length)
    return SafetensorsHeader(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise WeightFileError(f"cannot be read as safetensors: {shorten(name)} is in its header twice")
        found[name] = value
    return found


def _read_entry(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    label = f"holds a wrong tensor {shorten(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(f"{label}: the header must give dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise WeightFileError(f"{label}: dtype {shorten(entry['dtype'])}; known are {', '.join(DTYPES)}")
    shape, span = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > _MAX_EXTENT:
        raise WeightFileError(f"{label}: the shape {shorten(shape)}")
    if not _whole_numbers(span) or len(span) != 2 or span[0] > span[1]:
        raise WeightFileError(f"{label}: the offsets {shorten(span)}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != span[1] - span[0]:
        raise WeightFileError(
            f"{label}: shape {shorten(shape)} in {entry['dtype']} needs {needed:,} bytes, its offsets give "
            f"{span[1] - span[0]:,}"
        )
    return dtype, tuple(shape), (span[0], span[1])


def _check_offsets(offsets: list[tuple[int, int, str]], size: int) -> None:
    """Raises WeightFileError unless the tensors fill the file without gaps or overlaps."""
    end = 0
    for begin, stop, name in sorted(offsets):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise WeightFileError(f"holds a wrong tensor {shorten(name)}: it {what}")
        if stop > size:
            raise WeightFileError(
                f"is incomplete: {shorten(name)} ends after {stop:,} bytes of data, the file has {size:,}; "
                "copy or download it again"
            )
        end = stop
    if end != size:
        raise WeightFileError(
            f"has {size - end:,} bytes more than its header describes; copy or download it again"
        )


def _whole_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def guess_content(path: Path) -> str:
    """What else the file seems to be, as the end of a message; empty if unknown."""
    begin = first_bytes(path, 256)[0]
    if begin.startswith(b"version https://git-lfs"):
        return "; it is a Git LFS pointer: fetch the file itself with `git lfs pull`"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "; it is a web page: download the file itself"
    if begin.startswith((b"PK\3\4", b"\x80")) and path.suffix == ".safetensors":
        return "; it was written by torch.save: rename it to *.pt"
    if begin.lstrip().startswith(b"{"):
        return "; it is JSON, such as the index of a model in several files: give a file with tensors"
    return ""


def shorten(value: object, most: int = 100) -> str:
    """A value for a message: on one line, printable, at most `most` characters and an ellipsis."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
