"""Tar shards in the layout of WebDataset, and the bounds of a manifest's byte ranges.

A sample is consecutive members of one name: `000012.cls` (the label), `000012.json` (the row of the source
manifest) and `000012.mp4` (the video, unchanged). The same videos give the same bytes: no member has a time,
an owner or a name of this machine.
"""

import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.paths import decode_path
from pipelines.errors import VideoError
from pipelines.storage.object_store import is_url, object_size

BLOCK = tarfile.BLOCKSIZE
"""Bytes; members begin at multiples of it."""

_CACHED = 1024  # sizes of shards in memory while a manifest is checked


def shard_name(number: int) -> str:
    """The file name of a shard: `shard-000012.tar`."""
    return f"shard-{number:06d}.tar"


def sample_name(row: int, rows: int) -> str:
    """The name of a sample's members without extension: the row in the source manifest, of `rows` rows."""
    return f"{row:0{max(6, len(str(rows - 1)))}d}"


def member_extension(path: str) -> str:
    """The extension of a video's member: that of its file in lower case, or `.video` for an unusual one."""
    suffix = Path(path).suffix.lower()
    plain = suffix[1:].isascii() and suffix[1:].isalnum() and len(suffix) <= 9
    return suffix if plain and suffix not in (".cls", ".json") else ".video"


def start_member(file: BinaryIO, name: str, size: int) -> None:
    """Write the header of a member of `size` bytes, which have to follow."""
    member = tarfile.TarInfo(name)
    member.size = size
    file.write(member.tobuf(tarfile.GNU_FORMAT))


def end_member(file: BinaryIO) -> None:
    """Pad the content of a member to whole blocks."""
    file.write(bytes(-file.tell() % BLOCK))


def write_member(file: BinaryIO, name: str, content: bytes) -> None:
    """Write a member."""
    start_member(file, name, len(content))
    file.write(content)
    end_member(file)


def end_archive(file: BinaryIO) -> None:
    """Write the end of an archive."""
    file.write(bytes(2 * BLOCK))


def ranges_outside(manifest: Manifest) -> Iterator[tuple[int, str]]:
    """The rows whose byte range is not inside its file or object, ascending, each with its reason.

    Rows of whole files are not checked. Asks once for the size of each shard, if its rows are together.
    Raises StoreUnavailable where a store is away, DataError where the manifest is damaged.
    """
    sizes = lru_cache(_CACHED)(_size)
    for number, batch in enumerate(manifest.batch_slices()):
        offsets = batch["offset"].to_numpy()
        lengths = batch["length"].to_numpy()
        for inside in np.flatnonzero(lengths > 0).tolist():
            row = number * manifest.rows_per_batch + inside
            try:
                text = batch["path"][inside].as_py()
                size = sizes(text if is_url(text) else manifest.folder / decode_path(text))
            except VideoError as error:
                yield row, str(error)
                continue
            begin, length = int(offsets[inside]), int(lengths[inside])
            if begin + length > size:
                ends = f"has bytes {begin} to {begin + length} in the manifest"
                yield row, f"{ends}, but its shard has {size}"


def _size(location: str | Path) -> int:
    """Bytes of an object or a file. Raises VideoError where it is missing."""
    if isinstance(location, str):
        return object_size(location)
    try:
        return location.stat().st_size
    except OSError as error:
        raise VideoError(f"cannot be read: {error.strerror}") from error
