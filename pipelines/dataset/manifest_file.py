"""The memory-mapped file of a manifest and the checks of its content.

The header is checked when it is read, the buffers of a record batch against its number of rows when the batch
is mapped, and a string against its buffer when it is read. So a damaged file can neither crash the process
nor make it read outside a buffer. If a file is truncated in place while it is mapped, the kernel kills the
process (SIGBUS), as with every mapped file.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.dataset.arrow_footer import is_compressed, read_blocks
from pipelines.dataset.manifest_rows import MOST_PIXELS, ManifestRow, SourceKind, check_row, row_problems
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable

# 1: without optional columns, 2: with weights, 3: with sources. A manifest is written with the lowest of them
# that holds its columns, so that older programs can read it.
FORMAT_VERSION = 3

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

# `weight_before`, the sum of the weights of all previous rows, makes a weighted draw a binary search.
_WEIGHT_COLUMNS: dict[str, type] = {"weight": np.float64, "weight_before": np.float64}

# Of manifests with rows that are not whole video files.
_SOURCE_COLUMNS: dict[str, type] = {"source": np.int8, "first_frame": np.int32, "video_frames": np.int32}

_ALL_COLUMNS = {**_COLUMNS, **_SOURCE_COLUMNS, **_WEIGHT_COLUMNS}


def manifest_schema(*, weighted: bool, sources: bool) -> pa.Schema:
    """The columns of a manifest, with or without those of the weights and of the sources."""
    columns = {**_COLUMNS, **(_SOURCE_COLUMNS if sources else {}), **(_WEIGHT_COLUMNS if weighted else {})}
    kinds = {
        name: pa.string() if kind is str else pa.from_numpy_dtype(kind) for name, kind in columns.items()
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


ARROW_ERRORS = (pa.ArrowException, OSError, ValueError)
"""What Arrow raises for a damaged file."""

REMAKE = "Make it again with `uniformerv2 prepare`."

_ROW_BYTES = 44
"""Least bytes of a row: its numbers, and the offsets of its strings."""

_COUNT = re.compile(rb"[0-9]{1,18}")
_NAMED = 12  # columns that a message names


@dataclass(frozen=True)
class ManifestHeader:
    """The metadata of a manifest."""

    rows: int
    rows_per_batch: int
    fingerprint: str
    """SHA-256 of the content, as hexadecimal digits."""
    class_names: tuple[str, ...]
    total_weight: float | None
    """None in a manifest without weights."""

    def batch_rows(self, number: int) -> int:
        """Number of rows of record batch `number`."""
        return min(self.rows_per_batch, self.rows - number * self.rows_per_batch)


@dataclass(frozen=True)
class MappedFile:
    """The memory-mapped file of a manifest, and its header."""

    file: pa.NativeFile
    reader: pa.RecordBatchFileReader
    header: ManifestHeader
    blocks: np.ndarray
    """The place of each record batch in the file; see `arrow_footer.read_blocks`."""

    def batch(self, number: int) -> pa.RecordBatch:
        """A record batch. Its buffers are views of the file and are not checked.

        Raises one of `ARROW_ERRORS` if it is damaged or compressed.
        """
        if is_compressed(self.file, self.blocks[number]):
            raise ValueError("it is compressed, which a manifest must not be")
        return self.reader.get_batch(number)


def open_file(path: Path) -> MappedFile:
    """Map a manifest and check its header. The time does not depend on the number of rows.

    Raises:
        DataError: there is no such file, it cannot be read, it is not a manifest, its header is damaged, or a
            newer program wrote it.
    """
    name = printable(path)
    try:
        if not path.is_file():
            raise DataError(
                f"no manifest at {name}. Make one with `uniformerv2 prepare`, "
                f"for example `uniformerv2 prepare folder VIDEOS --out {name}`."
            )
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}.") from error
    try:
        file = pa.memory_map(os.fsencode(path))
        reader = pa.ipc.open_file(file)
        schema = reader.schema
        names = schema.names
    except ARROW_ERRORS as error:
        raise DataError(
            f"{name} is not a manifest, or is truncated: {arrow_message(error)} {REMAKE}"
        ) from error
    metadata = schema.metadata or {}
    if b"manifest_version" not in metadata:
        raise DataError(f"{name} is an Arrow file, but not a manifest: it has no manifest version.")
    try:
        version = _count(metadata, b"manifest_version")
        if version > FORMAT_VERSION:
            raise DataError(
                f"{name} has manifest format {version}; this program reads up to {FORMAT_VERSION}. "
                "Update the program, or make the manifest again with `uniformerv2 prepare`."
            )
        weighted = "weight" in names
        if not schema.equals(manifest_schema(weighted=weighted, sources="source" in names)):
            listed = ", ".join(map(printable, names[:_NAMED])) + (", ..." if len(names) > _NAMED else "")
            raise DataError(
                f"{name} does not have the columns of a manifest, or not their types; it has {listed[:400]}. "
                f"{REMAKE}"
            )
        header = _header(metadata, weighted, reader.num_record_batches, path.stat().st_size)
        blocks = read_blocks(file)
        if len(blocks) != reader.num_record_batches:
            raise ValueError(f"its footer lists {len(blocks)} batches, not {reader.num_record_batches}")
        return MappedFile(file, reader, header, blocks)
    except ValueError as error:
        raise DataError(f"{name} is damaged: {error}. {REMAKE}") from error


def _header(metadata: dict[bytes, bytes], weighted: bool, batches: int, size: int) -> ManifestHeader:
    """Raises ValueError if metadata is missing, invalid, or contradicts the file."""
    rows, per_batch = _count(metadata, b"rows"), _count(metadata, b"rows_per_batch")
    if per_batch < 1:
        raise ValueError("its header's rows_per_batch is 0")
    if batches != -(-rows // per_batch):
        raise ValueError(
            f"its header has rows {rows} and rows_per_batch {per_batch}, but the file has {batches} batches"
        )
    if size < rows * _ROW_BYTES:
        raise ValueError(
            f"its header has rows {rows}, which take at least {rows * _ROW_BYTES} bytes, but the file has "
            f"{size} (a manifest is not compressed)"
        )
    fingerprint = _value(metadata, b"fingerprint")
    if not re.fullmatch(r"[0-9a-f]{64}", fingerprint):
        raise ValueError("its header's fingerprint is not 64 hexadecimal digits")
    total = None
    if weighted:
        if not rows:
            raise ValueError("it has weights, but no rows")
        total = float(_value(metadata, b"total_weight"))
        if not 0 < total < inf:
            raise ValueError(f"its header's total_weight is {total:g}")
    names = _class_names(_value(metadata, b"class_names"))
    if rows and not names:
        raise ValueError(
            f"its header has rows {rows}, but no class name in class_names: no label is possible"
        )
    return ManifestHeader(rows, per_batch, fingerprint, names, total)


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
        raise ValueError(f"its header's {name.decode()} is not a number")
    return int(value)


def _class_names(text: str) -> tuple[str, ...]:
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its header's class_names are not JSON") from error
    # Older programs wrote manifests with an empty name, so it is accepted here.
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its header's class_names are not a list of names")
    if len(set(names)) < len(names):
        raise ValueError("its header's class_names contain a name twice")
    if any("\ud800" <= character <= "\udfff" for character in "".join(names)):
        raise ValueError("its header's class_names cannot be encoded as UTF-8")
    return tuple(names)


class Columns:
    """One record batch as views of the mapped file. Nothing is read until a value is accessed."""

    def __init__(self, batch: pa.RecordBatch, rows: int) -> None:
        """
        Args:
            rows: expected number of rows.

        Raises:
            ValueError: the number of rows is another, or a column does not have its buffers.
        """
        if batch.num_rows != rows:
            raise ValueError(f"a batch has {batch.num_rows} rows instead of {rows}")
        self.rows = rows
        self._numbers: dict[str, np.ndarray] = {}
        self._strings: dict[str, tuple[np.ndarray, memoryview]] = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            # NumPy raises ValueError if a buffer is too short for the rows.
            validity, *buffers = column.buffers()
            if validity is not None:
                raise ValueError(f"column {name} has missing values")
            kind = _ALL_COLUMNS[name]
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
            VideoError: the value is outside the column's buffer, or not UTF-8.
        """
        ends, data = self._strings[name]
        begin, end = int(ends[index]), int(ends[index + 1])
        if not 0 <= begin <= end <= len(data):
            raise VideoError(f"has a {name} outside the manifest's buffer: the manifest is damaged")
        try:
            return str(data[begin:end], "utf-8")
        except UnicodeDecodeError as error:
            raise VideoError(f"has a {name} that is not UTF-8: the manifest is damaged") from error

    def row(self, index: int, classes: int) -> ManifestRow:
        """The row at `index`.

        Raises:
            VideoError: as `check_row`, or a string is damaged.
        """
        row = self._row(index, {name: self.text(name, index) for name in self._strings})
        check_row(row, classes)
        return row

    def _row(self, index: int, strings: dict[str, str]) -> ManifestRow:
        number = self._numbers
        return ManifestRow(
            path=strings["path"],
            offset=number["offset"].item(index),
            length=number["length"].item(index),
            label=number["label"].item(index),
            frames=number["frames"].item(index),
            fps=number["fps"].item(index),
            width=number["width"].item(index),
            height=number["height"].item(index),
            codec=strings["codec"],
            **{
                name: number[name].item(index)
                for name in ("weight", *_SOURCE_COLUMNS)
                if name in number  # otherwise the row has the default
            },
        )

    def problems(self, classes: int) -> Iterator[tuple[int, str, str]]:
        """Row, column and reason of each value for which `row` raises VideoError; rows ascending."""
        for index in np.flatnonzero(self._suspects(classes)).tolist():
            strings = {}
            for name in self._strings:
                try:
                    strings[name] = self.text(name, index)
                except VideoError as defect:
                    strings[name] = "?"  # any valid value: the reason is given here
                    yield index, name, str(defect)
            for name, reason in row_problems(self._row(index, strings), classes):
                yield index, name, reason

    def _suspects(self, classes: int) -> np.ndarray:
        """Vectorised check. bool per row: whether `row` may raise for it and has to be called."""
        number = self._numbers
        suspects = (number["label"] < 0) | (number["label"] >= classes) | (number["frames"] < 1)
        for name in ("width", "height"):
            suspects |= (number[name] < 1) | (number[name] > MOST_PIXELS)
        for name in ("fps", "weight") if "weight" in number else ("fps",):
            suspects |= ~(np.isfinite(number[name]) & (number[name] >= 0))
        suspects |= (number["offset"] < 0) | (number["length"] < 0)
        suspects |= (number["offset"] != 0) & (number["length"] == 0)
        if "source" in number:
            first, whole, frames = number["first_frame"], number["video_frames"], number["frames"]
            suspects |= ~np.isin(number["source"], list(SourceKind)) | (first < 0) | (whole < 0)
            suspects |= np.where(whole > 0, first > whole - frames, first > 0)
            suspects |= (number["source"] == SourceKind.FRAMES) & (number["length"] != 0)
        for name, (ends, data) in self._strings.items():
            if self.rows and not _are_strings(ends, data):
                return np.ones(self.rows, bool)
            if name == "path":
                suspects |= ends[1:] == ends[:-1]
                if self.rows and b"\0" in bytes(data[ends[0] : ends[-1]]):
                    return np.ones(self.rows, bool)
        return suspects


def _are_strings(ends: np.ndarray, data: memoryview) -> bool:
    """Whether all strings of a column are in its buffer, in ascending order, and each is UTF-8."""
    begin, end = int(ends[0]), int(ends[-1])
    if begin < 0 or end > len(data) or bool((ends[1:] < ends[:-1]).any()):
        return False
    content = data[begin:end]
    try:
        str(content, "utf-8")
    except UnicodeDecodeError:
        return False
    inside = ends[(ends > begin) & (ends < end)] - begin
    divided = np.frombuffer(content, np.uint8)[inside] & 0xC0 == 0x80  # a character between two strings
    return not bool(divided.any())


def arrow_message(error: Exception) -> str:
    """The text of an Arrow error on one line, shortened to 300 characters."""
    text = printable(str(error))
    return f"{text[:300]}..." if len(text) > 300 else f"{text.rstrip('.')}."
