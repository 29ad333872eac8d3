"""The dataset on disk: one memory-mapped Arrow IPC file, one row per video.

Opening reads the footer and the first page only, whatever the number of rows: record batches are mapped when
a row in them is asked for, and the operating system shares their pages between all processes of a machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipelines import DataError
from pipelines.paths import decode_path as decode_path
from pipelines.paths import encode_path as encode_path
from pipelines.paths import printable

# 1: without weights, 2: with them. Without, it is still written as 1, which older programs read, too.
FORMAT_VERSION = 2

# Large enough that ten million rows need 153 footer entries, small enough that writing holds a few MB.
ROWS_PER_BATCH = 65_536

_SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "path": pa.string(),
            "offset": pa.int64(),
            "length": pa.int64(),
            "label": pa.int32(),
            "frames": pa.int32(),
            "fps": pa.float32(),
            "width": pa.int32(),
            "height": pa.int32(),
            "codec": pa.string(),
        }.items()
    ]
)

# `weight_before`, the sum of the weights of all rows before, is what makes a weighted draw a binary search.
_WEIGHTED_SCHEMA = pa.schema(
    [*_SCHEMA, *(pa.field(name, pa.float64(), nullable=False) for name in ("weight", "weight_before"))]
)


@dataclass(frozen=True, slots=True)
class Row:
    """One video: where its bytes are, what it shows, what its frames are like."""

    path: str
    """The file, as `encode_path` writes it; a relative path is relative to the manifest's folder."""
    offset: int
    """First byte of the video inside the file."""
    length: int
    """Number of bytes; with offset 0, a length of 0 means the whole file."""
    label: int
    """Index into the manifest's class names."""
    frames: int
    """Number of video frames, counted, not taken from the container's header."""
    fps: float
    """Average frames per second, in single precision once stored."""
    width: int
    """Pixels, as coded: rotation metadata is not applied."""
    height: int
    """Pixels, as coded: rotation metadata is not applied."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ..."""
    weight: float = 1.0
    """How often training draws it, compared with the others; 1 in a manifest without weights."""


class _Batch(NamedTuple):
    """The columns of one record batch as views of the mapped file: numbers in NumPy, strings in Arrow."""

    path: Any
    offset: np.ndarray
    length: np.ndarray
    label: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    width: np.ndarray
    height: np.ndarray
    codec: Any
    weight: np.ndarray | None = None
    weight_before: np.ndarray | None = None


class Manifest:
    """A dataset that is open for reading; made by `Manifest.open` or `write_manifest`.

    Pickles as its paths and fingerprint, so handing it to a worker process costs nothing; the worker maps the
    same file again and refuses it if it was replaced meanwhile.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        reader: pa.RecordBatchFileReader,
        rows: int,
        rows_per_batch: int,
        fingerprint: str,
        class_names: tuple[str, ...],
        total_weight: float | None,
    ) -> None:
        self.path = path
        self.folder = folder
        self.fingerprint = fingerprint
        self.class_names = class_names
        self.weighted = total_weight is not None
        self.total_weight = float(rows) if total_weight is None else total_weight
        self._reader = reader
        self._rows = rows
        self._rows_per_batch = rows_per_batch
        self._batches: dict[int, _Batch] = {}

    @classmethod
    def open(cls, path: str | Path, folder: Path | None = None) -> Manifest:
        """Map the manifest at `path`; time and memory do not depend on its length.

        Args:
            path: the file.
            folder: what relative paths of videos are relative to; for a copy, the original's folder.

        Raises:
            DataError: there is no such file, it is no manifest, or a newer program wrote it.
        """
        path = Path(path).absolute()
        shown = printable(path)
        if not path.is_file():
            raise DataError(
                f"no manifest at {shown}. Make one with `python launch/prepare.py`, "
                f"for example `python launch/prepare.py folder VIDEOS --out {shown}`."
            )
        try:
            reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{shown} is not a manifest, or was cut short: {error}. Make it again with "
                "`python launch/prepare.py`."
            ) from error
        metadata = {key.decode(): value for key, value in (reader.schema.metadata or {}).items()}
        if "manifest_version" not in metadata:
            raise DataError(f"{shown} is an Arrow file, but not a manifest: it has no manifest version.")
        version = int(metadata["manifest_version"])
        if version > FORMAT_VERSION:
            raise DataError(
                f"{shown} has manifest format {version}; this program reads up to {FORMAT_VERSION}. "
                "Update the program, or make the manifest again with `python launch/prepare.py`."
            )
        weighted = reader.schema.equals(_WEIGHTED_SCHEMA)
        if not weighted and not reader.schema.equals(_SCHEMA):
            raise DataError(f"{shown} does not have the columns of a manifest, but {reader.schema.names}.")
        return cls(
            path,
            path.parent if folder is None else folder.absolute(),
            reader,
            rows=int(metadata["rows"]),
            rows_per_batch=int(metadata["rows_per_batch"]),
            fingerprint=metadata["fingerprint"].decode(),
            class_names=tuple(json.loads(metadata["class_names"])),
            total_weight=float(metadata["total_weight"]) if weighted else None,
        )

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> Row:
        """The row at `index`, 0 <= index < len(self).

        Raises:
            IndexError: there is no such row; negative indices are not counted from the end.
            DataError: the file is damaged there.
        """
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {printable(self.path)}, which has {self._rows} rows")
        number, inside = divmod(int(index), self._rows_per_batch)
        batch = self._batch(number)
        return Row(
            path=batch.path[inside].as_py(),
            offset=int(batch.offset[inside]),
            length=int(batch.length[inside]),
            label=int(batch.label[inside]),
            frames=int(batch.frames[inside]),
            fps=float(batch.fps[inside]),
            width=int(batch.width[inside]),
            height=int(batch.height[inside]),
            codec=batch.codec[inside].as_py(),
            weight=1.0 if batch.weight is None else float(batch.weight[inside]),
        )

    def row_at(self, weight: float) -> int:
        """The row under `weight` where all rows lie side by side, each as wide as its weight.

        A row of weight 0 is never found. Reads O(log rows) numbers of the file; without weights, none.

        Args:
            weight: 0 <= weight < self.total_weight.

        Raises:
            IndexError: `weight` is not in this range.
            DataError: the file is damaged there.
        """
        if not 0 <= weight < self.total_weight:
            raise IndexError(
                f"weight {weight} of {printable(self.path)}, whose weights sum up to {self.total_weight}"
            )
        if not self.weighted:
            return int(weight)
        low, high = 0, self._reader.num_record_batches
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._weights_before(middle)[0] <= weight else (low, middle)
        # The last row that begins at or before it: a row of weight 0 begins where the next one does.
        inside = int(np.searchsorted(self._weights_before(low), weight, side="right")) - 1
        return low * self._rows_per_batch + inside

    def record_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows as Arrow columns, a batch after the other, for what reads everything."""
        for number in range(self._reader.num_record_batches):
            yield self._reader.get_batch(number)

    def absolute_path(self, row: Row) -> Path:
        """Where the row's file is, resolved against the manifest's folder."""
        return self.folder / decode_path(row.path)

    def verify(self) -> None:
        """Read everything once and compare it with the fingerprint.

        Raises:
            DataError: the content is not what was written.
        """
        digest = _Fingerprint(self._reader.schema.names)
        for batch in self.record_batches():
            digest.update(batch)
        found = digest.hexdigest(self.class_names)
        if found != self.fingerprint:
            raise DataError(
                f"{printable(self.path)} is damaged: its content has fingerprint {found[:12]}, its header "
                f"says {self.fingerprint[:12]}. Make it again with `python launch/prepare.py`."
            )

    def _batch(self, number: int) -> _Batch:
        batch = self._batches.get(number)
        if batch is None:
            try:
                batch = self._batches[number] = self._map_batch(number)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{printable(self.path)} is damaged: {error} Make it again with "
                    "`python launch/prepare.py`."
                ) from error
        return batch

    def _weights_before(self, number: int) -> np.ndarray:
        before = self._batch(number).weight_before
        assert before is not None  # only asked of a manifest with weights
        return before

    def _map_batch(self, number: int) -> _Batch:
        # Not Array.to_numpy(), which imports pandas where it is installed: 45 MB in every worker.
        columns = self._reader.get_batch(number).columns
        return _Batch(*(c if pa.types.is_string(c.type) else np.from_dlpack(c) for c in columns))

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.fingerprint)


def write_manifest(
    path: str | Path, rows: Iterable[Row], class_names: Sequence[str], *, weighted: bool = False
) -> Manifest:
    """Write `rows` in their order and open the result.

    Memory is bounded by one record batch. The file appears under its name only when it is complete; a
    manifest that was there before stays untouched until then.

    Args:
        weighted: keep the rows' weights; without, they are not looked at.

    Raises:
        DataError: a class name is given twice, a label is not an index of `class_names`, or a weight is
            negative or no number, or all are 0.
    """
    schema = _without_sums(_WEIGHTED_SCHEMA) if weighted else _SCHEMA
    return write_columns(path, _record_batches(rows, schema), class_names)


def write_columns(
    path: str | Path, batches: Iterable[pa.RecordBatch], class_names: Sequence[str]
) -> Manifest:
    """Write rows that come as Arrow columns, as `write_manifest` does, and raising what it raises.

    Args:
        batches: the manifest's columns, with or without `weight`, in any order; `weight_before` is computed
            here. Each batch but the last has ROWS_PER_BATCH rows.
    """
    path = Path(path).absolute()
    names = tuple(class_names)
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"class names must differ; given more than once: {', '.join(repeated)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    iterator = iter(batches)
    first = next(iterator, None)
    weighted = first is not None and "weight" in first.schema.names
    schema = _WEIGHTED_SCHEMA if weighted else _SCHEMA
    with _temporary(path, "body") as body, _temporary(path, "whole") as whole:
        # The fingerprint stands in the schema, at the head of the file, and is known only after the last row:
        # the batches are written once to be hashed, and once behind their final header.
        digest = _Fingerprint(schema.names)
        total = Fraction()
        with body.open("wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in [] if first is None else chain([first], iterator):
                if digest.rows % ROWS_PER_BATCH:
                    raise ValueError(f"only the last batch may have other than {ROWS_PER_BATCH} rows")
                _check_labels(batch, names)
                columns = {name: batch[name] for name in batch.schema.names}
                if weighted:
                    columns["weight_before"], total = _sums_before(batch, total)
                batch = pa.record_batch([columns[name] for name in schema.names], schema=schema)
                digest.update(batch)
                writer.write_batch(batch)
        if weighted and not total:
            raise DataError(
                f"{printable(path)}: the weights of all {digest.rows} videos are 0, so none could be drawn; "
                "give those to train on a weight above 0"
            )
        metadata = {
            "manifest_version": "2" if weighted else "1",
            "fingerprint": digest.hexdigest(names),
            "class_names": json.dumps(names, ensure_ascii=False),
            "rows": str(digest.rows),
            "rows_per_batch": str(ROWS_PER_BATCH),
        }
        if weighted:
            metadata["total_weight"] = repr(float(total))
        schema = schema.with_metadata(metadata)
        with pa.memory_map(os.fsencode(body)) as source, whole.open("wb") as sink:
            reader = pa.ipc.open_file(source)
            with pa.ipc.new_file(sink, schema) as writer:
                for number in range(reader.num_record_batches):
                    writer.write_batch(reader.get_batch(number).replace_schema_metadata(schema.metadata))
            sink.flush()
            os.fsync(sink.fileno())
        whole.replace(path)
    return Manifest.open(path)


def _without_sums(schema: pa.Schema) -> pa.Schema:
    return schema.remove(schema.get_field_index("weight_before"))


def _check_labels(batch: pa.RecordBatch, class_names: tuple[str, ...]) -> None:
    labels = np.from_dlpack(batch["label"])
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DataError(
            f"{_shown_path(batch, wrong[0])} has label {labels[wrong[0]]}, but there are "
            f"{len(class_names)} classes: labels go from 0 to {len(class_names) - 1}"
        )


def _shown_path(batch: pa.RecordBatch, index: int) -> str:
    return printable(decode_path(batch["path"][index].as_py()))


def _sums_before(batch: pa.RecordBatch, begin: Fraction) -> tuple[pa.Array, Fraction]:
    """The column `weight_before` of a batch that begins at `begin`, and the sum where it ends.

    From batch to batch the sum is exact: rounding must not add up over millions of rows to where rows of
    equal weight would no longer come equally often.
    """
    weights = np.from_dlpack(batch["weight"])
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise DataError(
            f"{_shown_path(batch, wrong[0])} has weight {weights[wrong[0]]:g}; "
            "a weight is a number, 0 or more"
        )
    end = begin + Fraction(math.fsum(weights))
    before = np.minimum(float(begin) + np.concatenate([[0.0], np.cumsum(weights)[:-1]]), float(end))
    # What rounding leaves open at the end belongs to the last row with a weight, not to those of 0 after it.
    rows_with_weight = np.flatnonzero(weights)
    before[rows_with_weight[-1] + 1 if len(rows_with_weight) else 0 :] = float(end)
    return pa.array(before), end


class _Fingerprint:
    """SHA-256 of a table's content, the same however the table is cut into batches.

    Every column has a hash of its own that batches are fed to one after another; strings have two, of their
    lengths and of their bytes, so that moving a character to the next row is seen.
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.rows = 0
        self._columns = {name: (hashlib.sha256(), hashlib.sha256()) for name in columns}

    def update(self, batch: pa.RecordBatch) -> None:
        self.rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            fixed, variable = self._columns[name]
            if pa.types.is_string(column.type):
                _, offsets, data = column.buffers()
                ends = np.frombuffer(offsets, "<i4")[column.offset : column.offset + len(column) + 1]
                fixed.update(np.diff(ends).tobytes())
                if data is not None:
                    variable.update(memoryview(data)[ends[0] : ends[-1]])
            else:
                fixed.update(np.from_dlpack(column).tobytes())

    def hexdigest(self, class_names: Sequence[str]) -> str:
        columns = {name: [part.hexdigest() for part in parts] for name, parts in self._columns.items()}
        content = {"rows": self.rows, "columns": columns, "class_names": list(class_names)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _record_batches(rows: Iterable[Row], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    iterator = iter(rows)
    values = attrgetter(*schema.names)
    while chunk := list(islice(iterator, ROWS_PER_BATCH)):
        columns = zip(*map(values, chunk), strict=True)
        yield pa.record_batch(
            [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
            schema=schema,
        )


@contextmanager
def _temporary(path: Path, part: str) -> Iterator[Path]:
    """A name beside `path`, of this process alone, whose file is gone afterwards unless it was renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{part}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _reopen(path: Path, folder: Path, fingerprint: str) -> Manifest:
    manifest = Manifest.open(path, folder)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{printable(path)} was replaced by another manifest while a run was using it")
    return manifest
