"""The file of a manifest, none of whose content is trusted before it is checked.

What the header says is checked when it is read; the buffers of a record batch are checked against its number
of rows when it is mapped, without reading them; a string against its buffer when it is read. So a damaged
file can neither crash the process nor make it read beyond a buffer. One that is made shorter in place while
it is mapped ends the process (SIGBUS), as with every mapped file.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.dataset.arrow_compression import is_compressed
from pipelines.dataset.manifest_rows import MOST_PIXELS, ManifestRow, check_row
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable

# 1: without weights, 2: with them. Without, it is still written as 1, which older programs read, too.
FORMAT_VERSION = 2

_COLUMNS: dict[str, type] = {
    "path": str,
    "offset": np.int64,
    "length": np.int64,
    "label": np.int32,
    "frames": np.int32,
    "fps": np.float32,
    "width": np.int32,
    "height": np.int32,
    "codec": str,
}

# `weight_before`, the sum of the weights of all rows before, is what makes a weighted draw a binary search.
_WEIGHTED_COLUMNS: dict[str, type] = {**_COLUMNS, "weight": np.float64, "weight_before": np.float64}


def _schema(columns: dict[str, type]) -> pa.Schema:
    kinds = {
        name: pa.string() if kind is str else pa.from_numpy_dtype(kind) for name, kind in columns.items()
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


SCHEMA, WEIGHTED_SCHEMA = _schema(_COLUMNS), _schema(_WEIGHTED_COLUMNS)

ARROW_ERRORS = (pa.ArrowException, OSError, ValueError)
"""What Arrow says of a file that is damaged."""

AGAIN = "Make it again with `uniformerv2 prepare`."

_ROW_BYTES = 44
"""The fewest bytes that a row takes: its numbers, and the ends of its strings."""

_COUNT = re.compile(rb"[0-9]{1,18}")
_NAMED = 12
"""Columns that a message names."""


@dataclass(frozen=True)
class ManifestHeader:
    """What a manifest says of itself."""

    rows: int
    rows_per_batch: int
    fingerprint: str
    """SHA-256 of its content, as hexadecimal digits."""
    class_names: tuple[str, ...]
    total_weight: float | None
    """None in a manifest without weights."""

    def batch_rows(self, number: int) -> int:
        """How many rows a record batch has."""
        return min(self.rows_per_batch, self.rows - number * self.rows_per_batch)


@dataclass(frozen=True)
class MappedFile:
    """A manifest's file, mapped, and what its header says."""

    file: pa.NativeFile
    reader: pa.RecordBatchFileReader
    header: ManifestHeader

    @property
    def num_batches(self) -> int:
        return int(self.reader.num_record_batches)

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch, whose buffers lie in the file and are not checked.

        Raises one of `ARROW_ERRORS` where it is damaged or compressed.
        """
        if is_compressed(self.file, number):
            raise ValueError("it is compressed; a manifest is not")
        return self.reader.get_batch(number)


def open_file(path: Path) -> MappedFile:
    """Map a manifest and check its header, in a time that does not depend on its number of rows.

    Raises:
        DataError: there is no such file, it cannot be read, it is no manifest, its header is damaged, or a
            newer program wrote it.
    """
    shown = printable(path)
    try:
        if not path.is_file():
            raise DataError(
                f"no manifest at {shown}. Make one with `uniformerv2 prepare`, "
                f"for example `uniformerv2 prepare folder VIDEOS --out {shown}`."
            )
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror}.") from error
    try:
        file = pa.memory_map(os.fsencode(path))
        reader = pa.ipc.open_file(file)
        schema = reader.schema
        names = schema.names
    except ARROW_ERRORS as error:
        raise DataError(f"{shown} is not a manifest, or was cut short: {in_words(error)} {AGAIN}") from error
    metadata = schema.metadata or {}
    if b"manifest_version" not in metadata:
        raise DataError(f"{shown} is an Arrow file, but not a manifest: it has no manifest version.")
    try:
        version = _count(metadata, b"manifest_version")
        if version > FORMAT_VERSION:
            raise DataError(
                f"{shown} has manifest format {version}; this program reads up to {FORMAT_VERSION}. "
                "Update the program, or make the manifest again with `uniformerv2 prepare`."
            )
        weighted = schema.equals(WEIGHTED_SCHEMA)
        if not weighted and not schema.equals(SCHEMA):
            listed = ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
            raise DataError(
                f"{shown} does not have the columns of a manifest, or not their types, but {listed[:400]}. "
                f"{AGAIN}"
            )
        header = _header(metadata, weighted, reader.num_record_batches, path.stat().st_size)
        return MappedFile(file, reader, header)
    except ValueError as error:
        raise DataError(f"{shown} is damaged: {error}. {AGAIN}") from error


def _header(metadata: dict[bytes, bytes], weighted: bool, batches: int, size: int) -> ManifestHeader:
    """Raises ValueError for metadata that is missing, wrong, or contradicts the file."""
    rows, per_batch = _count(metadata, b"rows"), _count(metadata, b"rows_per_batch")
    if per_batch < 1:
        raise ValueError("its header's rows_per_batch is 0")
    if batches != -(-rows // per_batch):
        raise ValueError(
            f"its header says rows {rows} and rows_per_batch {per_batch}, but it has {batches} batches"
        )
    if size < rows * _ROW_BYTES:
        raise ValueError(
            f"its header says {rows} rows, which take {rows * _ROW_BYTES} bytes or more, and it has {size} "
            "(a manifest is not compressed)"
        )
    fingerprint = _value(metadata, b"fingerprint")
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError("its header's fingerprint is not one")
    total = None
    if weighted:
        if not rows:
            raise ValueError("it has weights and no rows")
        total = float(_value(metadata, b"total_weight"))
        if not 0 < total < inf:
            raise ValueError(f"its header's total_weight is {total:g}")
    return ManifestHeader(rows, per_batch, fingerprint, _class_names(_value(metadata, b"class_names")), total)


def _value(metadata: dict[bytes, bytes], name: bytes) -> str:
    if name not in metadata:
        raise ValueError(f"its header has no {name.decode()}")
    try:
        return metadata[name].decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its header's {name.decode()} is not UTF-8") from error


def _count(metadata: dict[bytes, bytes], name: bytes) -> int:
    value = _value(metadata, name).encode()
    if not _COUNT.fullmatch(value):
        raise ValueError(f"its header's {name.decode()} is no number")
    return int(value)


def _class_names(text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its header's class_names are no JSON") from error
    # An empty name is refused when a manifest is made; older programs made such manifests.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its header's class_names are no list of names")
    if len(set(names)) < len(names):
        raise ValueError("its header's class_names name a class twice")
    if any("\ud800" <= character <= "\udfff" for character in "".join(names)):
        raise ValueError("its header's class_names cannot be written as UTF-8")
    return tuple(names)


class Columns:
    """One record batch as views of the mapped file; nothing of it is read before it is asked for."""

    def __init__(self, batch: pa.RecordBatch, rows: int) -> None:
        """
        Args:
            rows: how many the batch has to have.

        Raises:
            ValueError: it has others, or its columns do not have the buffers that belong to them.
        """
        if batch.num_rows != rows:
            raise ValueError(f"a batch has {batch.num_rows} rows and should have {rows}")
        self.rows = rows
        self._numbers: dict[str, np.ndarray] = {}
        self._strings: dict[str, tuple[np.ndarray, memoryview]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            # A buffer is what the file has of it; NumPy refuses one that is too short for the rows.
            validity, *buffers = column.buffers()
            if validity is not None:
                raise ValueError(f"values of column {name} are missing")
            kind = _WEIGHTED_COLUMNS[name]
            if kind is str:
                ends = np.frombuffer(buffers[0] or b"", np.int32, rows + 1)
                self._strings[name] = (ends, memoryview(buffers[1] or b"").cast("B"))
            else:
                self._numbers[name] = np.frombuffer(buffers[0] or b"", kind, rows)

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers."""
        return self._numbers[name]

    def text(self, name: str, index: int) -> str:
        """One value of a column of strings.

        Raises:
            VideoError: it does not lie in the column's buffer, or is not UTF-8.
        """
        ends, data = self._strings[name]
        begin, end = int(ends[index]), int(ends[index + 1])
        if not 0 <= begin <= end <= len(data):
            raise VideoError(f"has a {name} in the manifest that lies outside of it: the file is damaged")
        try:
            return str(data[begin:end], "utf-8")
        except UnicodeDecodeError as error:
            raise VideoError(f"has a {name} in the manifest that is not UTF-8: it is damaged") from error

    def row(self, index: int, classes: int) -> ManifestRow:
        """The row at `index`.

        Raises:
            VideoError: see `check_row`, and where its strings are damaged.
        """
        number = self._numbers
        row = ManifestRow(
            path=self.text("path", index),
            offset=number["offset"].item(index),
            length=number["length"].item(index),
            label=number["label"].item(index),
            frames=number["frames"].item(index),
            fps=number["fps"].item(index),
            width=number["width"].item(index),
            height=number["height"].item(index),
            codec=self.text("codec", index),
            weight=number["weight"].item(index) if "weight" in number else 1.0,
        )
        check_row(row, classes)
        return row

    def wrong_rows(self, classes: int) -> list[tuple[int, str]]:
        """The rows that `row` refuses, ascending, and why."""
        wrong = []
        for index in np.flatnonzero(self._suspects(classes)).tolist():
            try:
                self.row(index, classes)
            except VideoError as defect:
                wrong.append((index, str(defect)))
        return wrong

    def _suspects(self, classes: int) -> np.ndarray:
        """For each row whether it has to be looked at by itself."""
        number = self._numbers
        suspects = (number["label"] < 0) | (number["label"] >= classes) | (number["frames"] < 1)
        for name in ("width", "height"):
            suspects |= (number[name] < 1) | (number[name] > MOST_PIXELS)
        for name in ("fps", "weight") if "weight" in number else ("fps",):
            suspects |= ~(np.isfinite(number[name]) & (number[name] >= 0))
        suspects |= (number["offset"] < 0) | (number["length"] < 0)
        suspects |= (number["offset"] != 0) & (number["length"] == 0)
        for name, (ends, data) in self._strings.items():
            if self.rows and not _are_strings(ends, data):
                return np.ones(self.rows, bool)
            if name == "path":
                suspects |= ends[1:] == ends[:-1]
                if self.rows and b"\0" in bytes(data[ends[0] : ends[-1]]):
                    return np.ones(self.rows, bool)
        return suspects


def _are_strings(ends: np.ndarray, data: memoryview) -> bool:
    """Whether all strings of a column lie in its buffer, one after another, and each is UTF-8."""
    begin, end = int(ends[0]), int(ends[-1])
    if begin < 0 or end > len(data) or bool((ends[1:] < ends[:-1]).any()):
        return False
    content = data[begin:end]
    try:
        str(content, "utf-8")
    except UnicodeDecodeError:
        return False
    inside = ends[(ends > begin) & (ends < end)] - begin
    return not bool((np.frombuffer(content, np.uint8)[inside] & 0xC0 == 0x80).any())  # parted characters


def in_words(error: Exception) -> str:
    """What Arrow says, on one line and no longer than one reads."""
    text = printable(str(error))
    return f"{text[:300]}..." if len(text) > 300 else f"{text.rstrip('.')}."
