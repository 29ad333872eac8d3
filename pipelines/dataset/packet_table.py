"""The packet indexes of a manifest's videos, in a memory-mapped file beside it.

Layout, all numbers little-endian: `_HEADER`, the records of the videos one after another, and a table with
two int64 for each row, the first byte of its video's record and the end. Rows of one video share its record;
a row whose video has no index has an empty one. docs/formats.md describes a record. Version 1 has a record
for each row, one after another, and a table of rows + 1 int64.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from pipelines.atomic_file import atomic_file
from pipelines.decode.packet_index import PacketIndex
from pipelines.errors import DataError
from pipelines.formatting import printable

SUFFIX = ".packets"

_MAGIC = b"UFv2PKTS"
_VERSION = 2
_HEADER = struct.Struct("<8sqqq32s")
"""Magic, version, rows, position of the table, fingerprint of the manifest."""
_ENTRY = 8  # bytes of the table's numbers


def packets_path(manifest: Path) -> Path:
    """The file of a manifest's packet indexes: `train.packets` for `train.arrow`."""
    return manifest.with_suffix(SUFFIX)


def index_hint(manifest: Path) -> str:
    """The lines for the user about a new manifest that has no packet indexes."""
    return (
        "No packet index was made; with one, a clip needs a part of its video file only:\n"
        f"  uniformerv2 prepare index {printable(manifest)}"
    )


class PacketTable:
    """A file of packet indexes that is open for reading."""

    def __init__(self, path: Path, mapped: mmap.mmap, begin: int, table: NDArray[np.int64]) -> None:
        """
        Args:
            begin: of the table in the file.
            table: begin and end of each row's record, (rows, 2).
        """
        self._path = path
        self._mapped = mapped
        self._table = table
        self._end = begin

    @classmethod
    def open(cls, path: Path, rows: int, fingerprint: str) -> PacketTable | None:
        """Map the file at `path`; None where there is none. Time and memory do not depend on its length.

        Args:
            rows, fingerprint: of the manifest.

        Raises DataError for a file that is damaged or of another manifest.
        """
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        except ValueError:
            header = b""  # mmap refuses an empty file
        except OSError as error:
            raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
        if not header.startswith(_MAGIC):
            raise _foreign(path)
        if len(header) < _HEADER.size:
            raise _damaged(path, f"it ends after {len(header)} bytes")
        _, version, count, begin, manifest = _HEADER.unpack(header)
        if version not in (1, _VERSION):
            raise _damaged(path, f"it has format {version}, and this program reads up to {_VERSION}")
        if manifest.hex() != fingerprint:
            raise DataError(
                f"{printable(path)} has the packet indexes of another manifest: make it again with "
                "`uniformerv2 prepare index`, or delete it"
            )
        numbers = rows + 1 if version == 1 else 2 * rows
        if count != rows or begin < _HEADER.size or begin + numbers * _ENTRY != len(mapped):
            raise _damaged(path, f"it has {len(mapped)} bytes, which do not fit {rows} rows")
        table: NDArray[np.int64] = np.frombuffer(mapped, "<i8", numbers, begin)
        pairs = sliding_window_view(table, 2) if version == 1 else table.reshape(rows, 2)
        return cls(path, mapped, begin, pairs)

    def read(self, row: int) -> PacketIndex | None:
        """The packet index of a row's video; None where it has none.

        Raises:
            DataError: the table is damaged there.
            VideoError: the record is.
        """
        begin, end = self._table[row].tolist()
        if begin == end:
            return None
        if not _HEADER.size <= begin < end <= self._end:
            raise _damaged(self._path, f"row {row} is at bytes {begin} to {end}")
        return PacketIndex.from_bytes(self._mapped[begin:end])


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"{printable(path)} is damaged: {why}. Make it again with `uniformerv2 prepare index`, or delete it"
    )


def _foreign(path: Path) -> DataError:
    return DataError(
        f"{printable(path)} has the name of a manifest's packet indexes, but does not begin as a file of "
        "packet indexes does: rename it or the manifest; or delete it, and make it again with "
        "`uniformerv2 prepare index`"
    )


def check_packets(manifest: Path) -> None:
    """Raises DataError if another file has the name of the packet indexes of the manifest at a path."""
    path = packets_path(manifest)
    try:
        with path.open("rb") as file:
            begin = file.read(len(_MAGIC))
    except IsADirectoryError:
        begin = b""
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            return  # no file can have this name
        raise DataError(f"{printable(path)} cannot be read: {error.strerror}") from error
    if begin != _MAGIC:
        raise _foreign(path)


class PacketTableWriter:
    """Writes the records of a manifest's rows, in their order; made by `write_packet_table`."""

    def __init__(self, file: BinaryIO, table: BinaryIO) -> None:
        self._file = file
        self._table = table
        self._position = _HEADER.size
        self.rows = 0
        file.write(bytes(_HEADER.size))

    def add(self, record: bytes) -> bool:
        """The record of the next row; empty where its video has no index. Returns whether it has one."""
        self._file.write(record)
        begin, self._position = self._position, self._position + len(record)
        self._append(struct.pack("<qq", begin, self._position))
        return bool(record)

    def repeat(self, row: int) -> bool:
        """Give the next row the record of an earlier one. Returns whether it has one."""
        self._table.seek(2 * _ENTRY * row)
        begin, end = struct.unpack("<qq", entry := self._table.read(2 * _ENTRY))
        self._table.seek(0, os.SEEK_END)
        self._append(entry)
        return bool(begin < end)

    def _append(self, entry: bytes) -> None:
        self._table.write(entry)
        self.rows += 1

    def finish(self, fingerprint: str) -> None:
        """Write what depends on all rows. fingerprint: of the manifest."""
        self._table.seek(0)
        shutil.copyfileobj(self._table, self._file, 2**20)
        self._file.seek(0)
        self._file.write(
            _HEADER.pack(_MAGIC, _VERSION, self.rows, self._position, bytes.fromhex(fingerprint))
        )
        self._file.flush()
        os.fsync(self._file.fileno())


@contextmanager
def write_packet_table(manifest: Path) -> Iterator[PacketTableWriter]:
    """Write the packet indexes of the manifest at a path; the file is renamed after `finish`, at the end.

    Memory does not grow with the rows. Raises OSError where the file cannot be written, and DataError where
    it would replace another file than packet indexes.
    """
    check_packets(manifest)
    path = packets_path(manifest)
    with (
        atomic_file(path) as partial,
        partial.open("wb") as file,
        tempfile.TemporaryFile(dir=path.parent) as table,
    ):
        yield PacketTableWriter(file, table)


def remove_other_packets(manifest: Path, fingerprint: str, rows: int) -> None:
    """Delete the packet indexes beside a new manifest if they are those of an older one.

    Raises DataError, and deletes nothing, if the file is not one of packet indexes.
    """
    check_packets(manifest)
    path = packets_path(manifest)
    try:
        PacketTable.open(path, rows, fingerprint)
    except DataError:
        path.unlink(missing_ok=True)
