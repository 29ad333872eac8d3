"""The header of a safetensors file, checked before any tensor is read.

The library checks much of this itself, but says neither which tensor is wrong nor what to do, and takes
whatever size a header names.
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
"""Bytes: a model of 100,000 tensors has less."""
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
    """A file of weights that cannot be read; the words follow its name."""


@dataclass(frozen=True)
class SafetensorsHeader:
    """tensors: dtype and shape by name, none of which lies outside the file. metadata: texts by name."""

    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


def first_bytes(path: Path, count: int) -> tuple[bytes, int]:
    """The beginning of an ordinary file, and the file's size. Raises FileError for what is none."""
    try:
        found = os.stat(path)
        kind = stat.S_IFMT(found.st_mode)
        if kind != stat.S_IFREG:
            hint = ": name a file in it, such as model.safetensors" if stat.S_ISDIR(kind) else ""
            raise WeightFileError(f"is {_KINDS.get(kind, 'no file')}, not a file of weights{hint}")
        # Without O_NONBLOCK a pipe that has just taken the file's place would be waited for.
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
    """Raises FileError for a file that is no safetensors file, or whose header is wrong in any way."""
    begin, size = first_bytes(path, 8)
    if size < 8:
        raise WeightFileError(f"cannot be read as safetensors: it has {size} bytes")
    length = int.from_bytes(begin, "little")
    if length > min(size - 8, MAX_HEADER):
        raise WeightFileError(
            f"cannot be read as safetensors: its first bytes name a header of {length:,} bytes; allowed are "
            f"{MAX_HEADER:,}, and the file has {size:,}{guess_content(path)}"
        )
    content = first_bytes(path, 8 + length)[0][8:]
    try:
        entries = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except WeightFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise WeightFileError(f"cannot be read as safetensors: its header is no JSON ({error})") from error
    if not isinstance(entries, dict):
        raise WeightFileError("cannot be read as safetensors: its header is no mapping of names")
    metadata = entries.pop("__metadata__", {})
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if not texts:
        raise WeightFileError("cannot be read as safetensors: its metadata are not texts by name")
    places: list[tuple[int, int, str]] = []
    tensors = {}
    for name, entry in entries.items():
        dtype, shape, place = _described(name, entry)
        tensors[name] = (dtype, shape)
        places.append((*place, name))
    _check_places(places, size - 8 - length)
    return SafetensorsHeader(tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise WeightFileError(
                f"cannot be read as safetensors: {shorten(name)} stands twice in its header"
            )
        found[name] = value
    return found


def _described(name: str, entry: object) -> tuple[torch.dtype, tuple[int, ...], tuple[int, int]]:
    label = f"holds a wrong tensor {shorten(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightFileError(f"{label}: the header must give dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise WeightFileError(f"{label}: dtype {shorten(entry['dtype'])}; known are {', '.join(DTYPES)}")
    shape, place = entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > _MAX_EXTENT:
        raise WeightFileError(f"{label}: the shape {shorten(shape)}")
    if not _whole_numbers(place) or len(place) != 2 or place[0] > place[1]:
        raise WeightFileError(f"{label}: the offsets {shorten(place)}")
    needed = math.prod(shape) * dtype.itemsize
    if needed != place[1] - place[0]:
        raise WeightFileError(
            f"{label}: shape {shorten(shape)} in {entry['dtype']} needs {needed:,} bytes, its offsets give "
            f"{place[1] - place[0]:,}"
        )
    return dtype, tuple(shape), (place[0], place[1])


def _check_places(places: list[tuple[int, int, str]], size: int) -> None:
    """Tensors follow one another, without gaps, and fill the file."""
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise WeightFileError(f"holds a wrong tensor {shorten(name)}: it {what}")
        if stop > size:
            raise WeightFileError(
                f"is not whole: {shorten(name)} ends after {stop:,} bytes of data, the file has {size:,}; "
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
    """What else the file seems to be, in words that end a message."""
    begin = first_bytes(path, 256)[0]
    if begin.startswith(b"version https://git-lfs"):
        return "; it is a pointer of Git LFS: fetch the file itself with `git lfs pull`"
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "; it is a web page: download the file itself"
    if begin.startswith((b"PK\3\4", b"\x80")) and path.suffix == ".safetensors":
        return "; it is a file of torch.save: name it *.pt"
    if begin.lstrip().startswith(b"{"):
        return "; it is JSON, such as the index of a model in several files: name a file of tensors"
    return ""


def shorten(value: object, most: int = 100) -> str:
    """A value for a message: on one line, printable, not too long."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
