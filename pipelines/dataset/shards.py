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
import pyarrow as pa

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.paths import decode_path
from pipelines.errors import VideoError
from pipelines.storage.object_store import is_url, object_size

BLOCK = tarfile.BLOCKSIZE
"""Bytes; members begin at multiples of it."""

_PATIENCE = 30.0  # seconds for which a store is asked for the size of a shard
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


class RangeCheck:
    """Compares the byte ranges of a manifest's rows with the sizes of their files and objects.

    Asks for the size of a shard once, if its rows are together; reads no content.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._size = lru_cache(_CACHED)(_size)

    def problems(self, number: int, batch: pa.RecordBatch) -> Iterator[tuple[int, str]]:
        """The rows of a record batch whose range is not inside its file or object, each with its reason.

        Rows of whole files, and of shards that are not there, are not checked. number: of the batch.

        Raises StoreUnavailable where a store is away.
        """
        manifest = self._manifest
        offsets, lengths = batch["offset"].to_numpy(), batch["length"].to_numpy()
        for inside in np.flatnonzero(lengths > 0).tolist():
            row = number * manifest.rows_per_batch + inside
            text = batch["path"][inside].as_py()
            size = self._size(text, manifest.folder)
            begin, length = int(offsets[inside]), int(lengths[inside])
            if size is not None and begin + length > size:
                ends = f"has bytes {begin} to {begin + length} in the manifest"
                yield row, f"{ends}, but its shard has {size}"


def _size(path: str, folder: Path) -> int | None:
    """Bytes of the file or object of a row's path; None where there is none: what reads it reports that."""
    try:
        if is_url(path):
            return object_size(path, patience=_PATIENCE)
        return (folder / decode_path(path)).stat().st_size
    except (VideoError, OSError):
        return None
