"""Manifests: one memory-mapped Arrow IPC file, one row per video.

Opening a manifest reads only its header and footer, whatever the number of rows. A record batch is mapped
when one of its rows is read; the operating system shares the pages between all processes of a machine.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from errno import EISDIR
from fractions import Fraction
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipelines.dataset.fingerprint import Fingerprint
from pipelines.dataset.manifest_file import (
    ARROW_ERRORS,
    REMAKE,
    Columns,
    MappedFile,
    arrow_message,
    manifest_schema,
    open_file,
)
from pipelines.dataset.manifest_rows import ManifestRow
from pipelines.dataset.manifest_rows import SourceKind as SourceKind
from pipelines.dataset.packet_table import PacketTable, check_packets, packets_path, remove_other_packets
from pipelines.dataset.paths import decode_path as decode_path
from pipelines.dataset.paths import encode_path as encode_path
from pipelines.dataset.paths import format_location
from pipelines.decode.packet_index import PacketIndex
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable
from pipelines.storage.object_store import is_url

# Ten million rows need 153 footer entries; writing a batch takes a few MB of memory.
ROWS_PER_BATCH = 65_536

_ROUNDING = 1e-9
"""Allowed error of a sum of weights, as a share of the total: 1000 times the rounding error of a batch."""


class Manifest:
    """A manifest that is open for reading; made by `Manifest.open` or `write_manifest`.

    Pickles as its paths and fingerprint. A worker process that unpickles it maps the same file again and
    raises DataError if the file was replaced in the meantime.
    """

    def __init__(self, path: Path, folder: Path, file: MappedFile, packets: Path | None) -> None:
        header = file.header
        self.path = path
        self.folder = folder
        self.fingerprint = header.fingerprint
        self.class_names = header.class_names
        self.weighted = header.total_weight is not None
        self.has_sources = "source" in file.reader.schema.names
        self.total_weight = float(header.rows) if header.total_weight is None else header.total_weight
        self.num_batches = int(file.reader.num_record_batches)
        self.rows_per_batch = header.rows_per_batch  # the last batch may have fewer
        self._file = file
        self._header = header
        self._rows = header.rows
        self._columns: dict[int, Columns] = {}
        self._sum_checked = False
        self._packets_path = packets
        self._packets = None if packets is None else PacketTable.open(packets, self._rows, self.fingerprint)

    @classmethod
    def open(
        cls,
        path: str | Path,
        folder: Path | None = None,
        *,
        packets: Path | None = None,
        indexed: bool = True,
    ) -> Manifest:
        """Map the manifest at `path` and check its header. Time and memory do not depend on its length.

        Args:
            path: the file.
            folder: the folder that relative paths are relative to. By default that of `path`; for a copy, the
                original's folder.
            packets: the file of the videos' packet indexes, which need not exist; by default the one beside
                the manifest.
            indexed: whether to use packet indexes; False opens a manifest whose packet indexes are damaged.

        Raises:
            DataError: there is no such file, or it is not a manifest, damaged, or of a newer program; or the
                packet indexes are damaged, or of another manifest.
        """
        path = Path(path).absolute()
        manifest = cls(
            path,
            path.parent if folder is None else folder.absolute(),
            open_file(path),
            (packets or packets_path(path)).absolute() if indexed else None,
        )
        if len(manifest):
            manifest._batch(manifest.num_batches - 1)  # checks how many rows it has
        return manifest

    def __len__(self) -> int:
        return self._rows

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self._file.reader.schema.names)

    def batch_rows(self, number: int) -> int:
        """Number of rows of record batch `number`."""
        return self._header.batch_rows(number)

    def row(self, index: int) -> ManifestRow:
        """The row at `index`, 0 <= index < len(self).

        Raises:
            IndexError: there is no such row; negative indices do not count from the end.
            VideoError: a value is not possible for a video; see `check_row`.
            DataError: the file is damaged there.
        """
        columns, inside = self._place(index)
        return columns.row(inside, len(self.class_names))

    def path_at(self, index: int) -> Path:
        """The absolute path of a row's file; raises as `row` does, but checks the path only.

        Of a row in an object store the URL, which names no local file.
        """
        columns, inside = self._place(index)
        return self._absolute(columns.text("path", inside))

    @property
    def has_packets(self) -> bool:
        """Whether there is a file of packet indexes."""
        return self._packets is not None

    def packets_at(self, index: int) -> PacketIndex | None:
        """The packet index of a row's video; None where there is none.

        Raises:
            IndexError: there is no such row.
            VideoError: the index is damaged.
            DataError: the file of the indexes is.
        """
        self._place(index)
        return None if self._packets is None else self._packets.read(index)

    def row_at_weight(self, weight: float) -> int:
        """The row i with w_0 + ... + w_(i-1) <= weight < w_0 + ... + w_i, where w are the rows' weights.

        Never a row of weight 0. Reads O(log rows) numbers of the file; without weights, none.

        Args:
            weight: 0 <= weight < self.total_weight.

        Raises:
            IndexError: `weight` is not in this range.
            DataError: the file is damaged there, or its cumulative sums do not match its weights.
        """
        if not 0 <= weight < self.total_weight:
            raise IndexError(
                f"weight {weight} of {printable(self.path)}, whose weights sum up to {self.total_weight}"
            )
        if not self.weighted:
            return int(weight)
        if not self._sum_checked:
            self._check_sum(self._rows - 1)
            self._sum_checked = True
        low, high = 0, self.num_batches
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._sum_before(middle, 0) <= weight else (low, middle)
        # The last row that begins at or before `weight`; a row of weight 0 begins where the next one does.
        before = self._batch(low).numbers("weight_before")
        inside = int(np.searchsorted(before, weight, side="right")) - 1
        row = low * self.rows_per_batch + inside
        if inside < 0 or not self._check_sum(row) > weight >= before[inside]:
            raise self._damaged("its cumulative sums of weights are not ascending.")
        return row

    def _check_sum(self, row: int) -> float:
        """The sum of the weights up to and including `row`.

        Raises:
            DataError: it is not the sum before the row plus the row's weight, up to rounding.
        """
        number, inside = divmod(row, self.rows_per_batch)
        columns = self._batch(number)
        if row + 1 == self._rows:
            end = self.total_weight
        elif inside + 1 < columns.rows:
            end = self._sum_before(number, inside + 1)
        else:
            end = self._sum_before(number + 1, 0)
        begin, weight = self._sum_before(number, inside), float(columns.numbers("weight")[inside])
        if not (weight >= 0 and abs(end - begin - weight) <= _ROUNDING * self.total_weight):
            raise self._damaged(f"row {row} {_format_wrong_sum(weight, begin, end)}.")
        return end

    def wrong_sums(self, number: int) -> Iterator[tuple[int, str]]:
        """The rows of a record batch whose weight is not the sum after the row minus the sum before it.

        Each with the reason, which continues a sentence that begins with the row. None without weights.

        Raises:
            DataError: the file is damaged there.
        """
        if not self.weighted:
            return
        columns = self._batch(number)
        before, weight = columns.numbers("weight_before"), columns.numbers("weight")
        is_last = number + 1 == self.num_batches
        ends = np.append(before[1:], self.total_weight if is_last else self._sum_before(number + 1, 0))
        with np.errstate(invalid="ignore", over="ignore"):  # of infinite numbers, which are wrong
            right = (weight >= 0) & (np.abs(ends - before - weight) <= _ROUNDING * self.total_weight)
        for inside in np.flatnonzero(~right).tolist():
            reason = _format_wrong_sum(float(weight[inside]), float(before[inside]), float(ends[inside]))
            yield number * self.rows_per_batch + inside, reason

    def _sum_before(self, number: int, inside: int) -> float:
        return float(self._batch(number).numbers("weight_before")[inside])

    def record_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows as Arrow record batches, with every value checked.

        Raises:
            DataError: the file is damaged, or a value of a row is not possible for a video.
        """
        for number, batch in enumerate(self.batch_slices()):
            for row, _, reason in self.row_problems(number):
                raise self._damaged(f"row {row}, {self.printable_path(row)}, {reason}.")
            yield batch

    def batch_slices(self, step: int = 1, every: int = 1) -> Iterator[pa.RecordBatch]:
        """A contiguous slice of each record batch, with 1 / `step` of its rows; other rows are not read.

        The values are safe to use, but not checked as in `record_batches`.

        Args:
            every: use only each `every`-th record batch.

        Raises:
            DataError: the file is damaged there.
        """
        for number in range(0, self.num_batches, every):
            yield self.read_batch(number, step)

    def read_batch(self, number: int, step: int = 1) -> pa.RecordBatch:
        """A contiguous slice of record batch `number`, with 1 / `step` of its rows; see `batch_slices`."""
        rows = -(-self._batch(number).rows // step)
        try:
            batch = self._file.batch(number).slice(number % step * rows, rows)
            batch.validate(full=True)
        except ARROW_ERRORS as error:
            raise self._damaged(arrow_message(error)) from error
        return batch

    def wrong_rows(self) -> Iterator[tuple[int, str]]:
        """The rows for which `row` raises VideoError, ascending, each with its message.

        Raises:
            DataError: the file is damaged.
        """
        before = None
        for number in range(self.num_batches):
            for row, _, reason in self.row_problems(number):
                if row != before:
                    yield row, reason
                before = row

    def row_problems(self, number: int) -> Iterator[tuple[int, str, str]]:
        """What is wrong with the rows of record batch `number`: row, column and reason of each wrong value.

        Raises:
            DataError: the batch is damaged, so that its rows cannot be told apart.
        """
        for index, column, reason in self._batch(number).problems(len(self.class_names)):
            yield number * self.rows_per_batch + index, column, reason

    def absolute_path(self, row: ManifestRow) -> Path:
        """The absolute path of the row's file; raises as `path_at` does."""
        return self._absolute(row.path)

    def _absolute(self, text: str) -> Path:
        return Path(text) if is_url(text) else self.folder / decode_path(text)

    def printable_path(self, index: int) -> str:
        """The absolute path of a row's file, or its URL, for messages, with the first byte of a video in a
        shard; if the stored path is damaged, the row's index."""
        try:
            columns, inside = self._place(index)
            text = columns.text("path", inside)
            offset = int(columns.numbers("offset")[inside])
            return format_location(text if is_url(text) else self._absolute(text), offset)
        except VideoError:
            return f"row {index} of {printable(self.path)}"

    def verify(self) -> None:
        """Read all content, compare it with the fingerprint and check each row.

        Raises:
            DataError: the fingerprint differs, or a value of a row is not possible for a video.
        """
        self.verify_fingerprint()
        for _ in self.record_batches():
            pass
        for number in range(self.num_batches):
            for row, reason in self.wrong_sums(number):
                raise self._damaged(f"row {row} {reason}.")

    def verify_fingerprint(self) -> None:
        """Read all content and compare it with the fingerprint.

        Raises:
            DataError: the fingerprint differs.
        """
        digest = Fingerprint(self._file.reader.schema.names)
        for batch in self.batch_slices():
            digest.update(batch)
        found = digest.hexdigest(self.class_names)
        if found != self.fingerprint:
            raise self._damaged(
                f"its content has fingerprint {found[:12]}, its header {self.fingerprint[:12]}."
            )

    def is_copy_of(self, other: Manifest) -> bool:
        """Whether both manifests are equal: reads this one, and compares it with the header of the other.

        Raises:
            DataError: the content of this manifest does not match its fingerprint.
        """
        if self._header != other._header:
            return False
        self.verify_fingerprint()
        return True

    def _place(self, index: int) -> tuple[Columns, int]:
        """The record batch of a row, and the row's index in it."""
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {printable(self.path)}, which has {self._rows} rows")
        number, inside = divmod(int(index), self.rows_per_batch)
        return self._batch(number), inside

    def _batch(self, number: int) -> Columns:
        columns = self._columns.get(number)
        if columns is None:
            try:
                columns = Columns(self._file.batch(number), self._header.batch_rows(number))
            except ARROW_ERRORS as error:
                raise self._damaged(arrow_message(error)) from error
            self._columns[number] = columns
        return columns

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{printable(self.path)} is damaged: {why} {REMAKE}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.fingerprint, self._packets_path)


def write_manifest(
    path: str | Path,
    rows: Iterable[ManifestRow],
    class_names: Sequence[str],
    *,
    weighted: bool = False,
    sources: bool = False,
    scratch: Path | None = None,
) -> Manifest:
    """Write `rows` in their order and open the result.

    Memory is bounded by one record batch. The file is renamed to `path` when it is complete; until then an
    older manifest at `path` is unchanged.

    Args:
        weighted: write the rows' weights; otherwise they are ignored.
        sources: write the columns of rows that are not whole video files (`source`, `first_frame`,
            `video_frames`); otherwise every row must be one.
        scratch: an existing folder of the same file system for the incomplete file; by default that of
            `path`.

    Raises:
        DataError: the file cannot be written, or another file has the name of its packet indexes (checked
            before the first row is requested); a class name is empty or occurs twice; a label is not an index
            of `class_names`; a weight is negative or not finite, or all are 0.
    """
    schema = manifest_schema(weighted=weighted, sources=sources)
    if weighted:
        schema = schema.remove(schema.get_field_index("weight_before"))
    return write_columns(path, _record_batches(rows, schema), class_names, scratch=scratch)


def write_columns(
    path: str | Path,
    batches: Iterable[pa.RecordBatch],
    class_names: Sequence[str],
    *,
    scratch: Path | None = None,
) -> Manifest:
    """Write rows given as Arrow record batches; otherwise as `write_manifest`.

    Args:
        batches: the manifest's columns, with or without `weight` and those of the sources, in any order;
            `weight_before` is computed. All batches but the last have equally many rows, of which one batch
            fits into memory.
    """
    path = Path(path).absolute()
    names = tuple(class_names)
    if not all(names):
        raise DataError("a class name is empty; give each class a name")
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"class names must differ; these occur more than once: {', '.join(repeated)}")
    check_packets(path)
    with _temporary(path, "body", scratch) as body, _temporary(path, "whole", scratch) as whole:
        # The fingerprint is in the schema at the head of the file, but known only after the last row. So the
        # batches are written twice: once to be hashed, once after the final header.
        with _open_for_writing(body, path) as sink:
            iterator = iter(batches)
            first = next(iterator, None)
            rows_per_batch = ROWS_PER_BATCH if first is None else max(1, first.num_rows)
            given = [] if first is None else first.schema.names
            weighted, sources = "weight" in given, "source" in given
            schema = manifest_schema(weighted=weighted, sources=sources)
            digest = Fingerprint(schema.names)
            total = Fraction()
            with pa.ipc.new_file(sink, schema) as writer:
                for batch in [] if first is None else chain([first], iterator):
                    if digest.rows % rows_per_batch or batch.num_rows > rows_per_batch:
                        raise ValueError(
                            f"only the last batch may have another number than {rows_per_batch} rows"
                        )
                    _check_labels(batch, names)
                    columns = {name: batch[name] for name in batch.schema.names}
                    if weighted:
                        columns["weight_before"], total = _sums_before(batch, total)
                    batch = pa.record_batch([columns[name] for name in schema.names], schema=schema)
                    digest.update(batch)
                    writer.write_batch(batch)
        if weighted and not total:
            raise DataError(
                f"{printable(path)}: the weights of all {digest.rows} videos are 0, so none can be drawn; "
                "give the videos to train on a weight above 0"
            )
        if digest.rows <= rows_per_batch:  # a single batch, which may be a short one
            rows_per_batch = max(ROWS_PER_BATCH, rows_per_batch)
        metadata = {
            "manifest_version": "3" if sources else "2" if weighted else "1",
            "fingerprint": digest.hexdigest(names),
            "class_names": json.dumps(names, ensure_ascii=False),
            "rows": str(digest.rows),
            "rows_per_batch": str(rows_per_batch),
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
        remove_other_packets(path, digest.hexdigest(names), digest.rows)
        whole.replace(path)
    return Manifest.open(path)


def _format_wrong_sum(weight: float, begin: float, end: float) -> str:
    return f"has weight {weight:g}, but the sums before and after it are {begin:g}, {end:g}"


def _check_labels(batch: pa.RecordBatch, class_names: tuple[str, ...]) -> None:
    labels = np.from_dlpack(batch["label"])
    wrong = np.flatnonzero((labels < 0) | (labels >= len(class_names)))
    if len(wrong):
        raise DataError(
            f"{_printable_path(batch, wrong[0])} has label {labels[wrong[0]]}, but there are "
            f"{len(class_names)} classes: labels go from 0 to {len(class_names) - 1}"
        )


def _printable_path(batch: pa.RecordBatch, index: int) -> str:
    return format_location(decode_path(batch["path"][index].as_py()), batch["offset"][index].as_py())


def _sums_before(batch: pa.RecordBatch, begin: Fraction) -> tuple[pa.Array, Fraction]:
    """The column `weight_before` of a batch whose first value is `begin`, and the sum after its last row.

    The sum is exact from batch to batch. Otherwise rounding errors would add up over millions of rows, and
    rows of equal weight would not be drawn equally often.
    """
    weights = np.from_dlpack(batch["weight"])
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        raise DataError(
            f"{_printable_path(batch, wrong[0])} has weight {weights[wrong[0]]:g}; "
            "a weight must be a number, 0 or more"
        )
    end = begin + Fraction(math.fsum(weights))
    before = np.minimum(float(begin) + np.concatenate([[0.0], np.cumsum(weights)[:-1]]), float(end))
    # The rounding error at the end goes to the last row with a weight, not to rows of weight 0 after it.
    rows_with_weight = np.flatnonzero(weights)
    before[rows_with_weight[-1] + 1 if len(rows_with_weight) else 0 :] = float(end)
    return pa.array(before), end


def _record_batches(rows: Iterable[ManifestRow], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    iterator = iter(rows)
    values = attrgetter(*schema.names)
    sources = "source" in schema.names
    while chunk := list(islice(iterator, ROWS_PER_BATCH)):
        if not sources and any(row.source or row.is_segment for row in chunk):
            raise ValueError("a row is not a whole video file: write the manifest with `sources`")
        columns = zip(*map(values, chunk), strict=True)
        yield pa.record_batch(
            [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)],
            schema=schema,
        )


@contextmanager
def _temporary(path: Path, part: str, folder: Path | None) -> Iterator[Path]:
    """A file name that only this process uses, in `folder` or beside `path`.

    At the end its file is deleted if it exists.
    """
    temporary = (folder or path.parent) / f".{path.name}.{os.getpid()}.{part}"
    try:
        yield temporary
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


def _open_for_writing(file: Path, path: Path) -> BinaryIO:
    """Open `file`, which is beside the manifest `path`, for writing; makes the folder.

    Raises:
        DataError: the manifest cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        return file.open("wb")
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be written: {error.strerror}") from error


def _reopen(path: Path, folder: Path, fingerprint: str, packets: Path | None) -> Manifest:
    manifest = Manifest.open(path, folder, packets=packets, indexed=packets is not None)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{printable(path)} was replaced by another manifest while a run used it")
    return manifest
