"""The packet indexes of a manifest's videos, in a memory-mapped file beside it.

Layout, all numbers little-endian: `_HEADER`, the records of the rows one after another, and a table of
rows + 1 int64, the first byte of each record and the end of the last. A row whose video has no index has an
empty record. docs/formats.md describes a record.
"""

from __future__ import annotations

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
from numpy.typing import NDArray

from pipelines.atomic_file import atomic_file
from pipelines.decode.packet_index import PacketIndex
from pipelines.errors import DataError
from pipelines.formatting import printable

SUFFIX = ".packets"

_MAGIC = b"UFv2PKTS"
_VERSION = 1
_HEADER = struct.Struct("<8sqqq32s")
"""Magic, version, rows, position of the table, fingerprint of the manifest."""
_ENTRY = 8  # bytes of the table's numbers


def packets_path(manifest: Path) -> Path:
    """The file of a manifest's packet indexes: `train.packets` for `train.arrow`."""
    return manifest.with_suffix(SUFFIX)


class PacketTable:
    """A file of packet indexes that is open for reading."""

    def __init__(self, path: Path, mapped: mmap.mmap, rows: int, begin: int) -> None:
        self._path = path
        self._mapped = mapped
        self._table: NDArray[np.int64] = np.frombuffer(mapped, "<i8", rows + 1, begin)
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
        if version != _VERSION:
            raise _damaged(path, f"it has format {version}, and this program reads {_VERSION}")
        if manifest.hex() != fingerprint:
            raise DataError(
                f"{printable(path)} has the packet indexes of another manifest: make it again with "
                "`uniformerv2 prepare index`, or delete it"
            )
        if count != rows or begin < _HEADER.size or begin + (rows + 1) * _ENTRY != len(mapped):
            raise _damaged(path, f"it has {len(mapped)} bytes, which do not fit {rows} rows")
        return cls(path, mapped, rows, begin)

    def read(self, row: int) -> PacketIndex | None:
        """The packet index of a row's video; None where it has none.

        Raises:
            DataError: the table is damaged there.
            VideoError: the record is.
        """
        begin, end = self._table[row : row + 2].tolist()
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
    except FileNotFoundError:
        return
    except IsADirectoryError:
        begin = b""
    except OSError as error:
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
        self._append_position()

    def add(self, record: bytes) -> None:
        """The record of the next row; empty where its video has no index."""
        self._file.write(record)
        self._position += len(record)
        self.rows += 1
        self._append_position()

    def _append_position(self) -> None:
        self._table.write(self._position.to_bytes(_ENTRY, "little"))

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
