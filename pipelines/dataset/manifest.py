"""The dataset on disk: one memory-mapped Arrow IPC file, one row per video.

Opening reads the footer and the first page only, whatever the number of rows: record batches are mapped when
a row in them is asked for, and the operating system shares their pages between all processes of a machine.
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
    AGAIN,
    ARROW_ERRORS,
    SCHEMA,
    WEIGHTED_SCHEMA,
    Columns,
    MappedFile,
    in_words,
    open_file,
)
from pipelines.dataset.manifest_rows import ManifestRow
from pipelines.dataset.paths import decode_path as decode_path
from pipelines.dataset.paths import encode_path as encode_path
from pipelines.errors import DataError, VideoError
from pipelines.formatting import printable

# Large enough that ten million rows need 153 footer entries, small enough that writing holds a few MB.
ROWS_PER_BATCH = 65_536

_ROUNDING = 1e-9
"""Share of all weights by which a sum of them may be off: a thousand times what adding up a batch costs."""


class Manifest:
    """A dataset that is open for reading; made by `Manifest.open` or `write_manifest`.

    Pickles as its paths and fingerprint, so handing it to a worker process costs nothing; the worker maps the
    same file again and refuses it if it was replaced meanwhile.
    """

    def __init__(self, path: Path, folder: Path, file: MappedFile) -> None:
        header = file.header
        self.path = path
        self.folder = folder
        self.fingerprint = header.fingerprint
        self.class_names = header.class_names
        self.weighted = header.total_weight is not None
        self.total_weight = float(header.rows) if header.total_weight is None else header.total_weight
        self._file = file
        self._header = header
        self._rows = header.rows
        self._columns: dict[int, Columns] = {}
        self._sum_checked = False

    @classmethod
    def open(cls, path: str | Path, folder: Path | None = None) -> Manifest:
        """Map the manifest at `path` and check its header; time and memory do not depend on its length.

        Args:
            path: the file.
            folder: what relative paths of videos are relative to; for a copy, the original's folder.

        Raises:
            DataError: there is no such file, it is no manifest, it is damaged, or a newer program wrote it.
        """
        path = Path(path).absolute()
        manifest = cls(path, path.parent if folder is None else folder.absolute(), open_file(path))
        if len(manifest):
            manifest._batch(manifest._file.num_batches - 1)  # it holds the rest of the rows
        return manifest

    def __len__(self) -> int:
        return self._rows

    def row(self, index: int) -> ManifestRow:
        """The row at `index`, 0 <= index < len(self).

        Raises:
            IndexError: there is no such row; negative indices are not counted from the end.
            VideoError: its values cannot be those of a video; see `check_row`.
            DataError: the file is damaged there.
        """
        columns, inside = self._place(index)
        return columns.row(inside, len(self.class_names))

    def path_at(self, index: int) -> Path:
        """Where the file of a row is, whatever else stands in it; raises what `row` does."""
        columns, inside = self._place(index)
        return self.folder / decode_path(columns.text("path", inside))

    def row_at_weight(self, weight: float) -> int:
        """The row under `weight` where all rows lie side by side, each as wide as its weight.

        A row of weight 0 is never found. Reads O(log rows) numbers of the file; without weights, none.

        Args:
            weight: 0 <= weight < self.total_weight.

        Raises:
            IndexError: `weight` is not in this range.
            DataError: the file is damaged there, or its sums of weights are not those of its weights.
        """
        if not 0 <= weight < self.total_weight:
            raise IndexError(
                f"weight {weight} of {printable(self.path)}, whose weights sum up to {self.total_weight}"
            )
        if not self.weighted:
            return int(weight)
        if not self._sum_checked:
            self._check_width(self._rows - 1)
            self._sum_checked = True
        low, high = 0, self._file.num_batches
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._sum_before(middle, 0) <= weight else (low, middle)
        # The last row that begins at or before it: a row of weight 0 begins where the next one does.
        before = self._batch(low).numbers("weight_before")
        inside = int(np.searchsorted(before, weight, side="right")) - 1
        row = low * self._header.rows_per_batch + inside
        if inside < 0 or not self._check_width(row) > weight >= before[inside]:
            raise self._damaged("its sums of weights do not ascend.")
        return row

    def _check_width(self, row: int) -> float:
        """Where the row ends among the weights laid side by side.

        Raises:
            DataError: that is not where it begins and its weight more, up to rounding.
        """
        number, inside = divmod(row, self._header.rows_per_batch)
        columns = self._batch(number)
        if row + 1 == self._rows:
            end = self.total_weight
        elif inside + 1 < columns.rows:
            end = self._sum_before(number, inside + 1)
        else:
            end = self._sum_before(number + 1, 0)
        begin, weight = self._sum_before(number, inside), float(columns.numbers("weight")[inside])
        if not (weight >= 0 and abs(end - begin - weight) <= _ROUNDING * self.total_weight):
            raise self._damaged(
                f"row {row} has weight {weight:g}, and reaches from {begin:g} to {end:g} among all weights."
            )
        return end

    def _check_widths(self, number: int) -> None:
        """Do for all rows of a batch what `_check_width` does for one."""
        columns = self._batch(number)
        before, weight = columns.numbers("weight_before"), columns.numbers("weight")
        first = number * self._header.rows_per_batch
        ends = np.append(before[1:], self._check_width(first + columns.rows - 1))
        right = (weight >= 0) & (np.abs(ends - before - weight) <= _ROUNDING * self.total_weight)
        for inside in np.flatnonzero(~right)[:1].tolist():
            self._check_width(first + inside)

    def _sum_before(self, number: int, inside: int) -> float:
        return float(self._batch(number).numbers("weight_before")[inside])

    def record_batches(self) -> Iterator[pa.RecordBatch]:
        """All rows as Arrow columns, a batch after the other, for what reads everything.

        Raises:
            DataError: the file is damaged, or the values of a row cannot be those of a video.
        """
        for number, batch in enumerate(self.batch_slices()):
            wrong = self._batch(number).wrong_rows(len(self.class_names))
            if wrong:
                index, reason = wrong[0]
                row = number * self._header.rows_per_batch + index
                raise self._damaged(f"row {row}, {self.printable_path(row)}, {reason}.")
            yield batch

    @property
    def num_batches(self) -> int:
        """How many record batches it has."""
        return self._file.num_batches

    @property
    def rows_per_batch(self) -> int:
        """How many rows each record batch but the last has."""
        return self._header.rows_per_batch

    def batch_slices(self, step: int = 1, every: int = 1) -> Iterator[pa.RecordBatch]:
        """One of `step` rows of each record batch, side by side, as Arrow columns; no others are read.

        Args:
            every: take the first of so many record batches only.

        The values of the rows are not checked, as `record_batches` does, but can be used safely.

        Raises:
            DataError: the file is damaged there.
        """
        for number in range(0, self._file.num_batches, every):
            rows = -(-self._batch(number).rows // step)
            try:
                batch = self._file.batch(number).slice(number % step * rows, rows)
                batch.validate(full=True)
            except ARROW_ERRORS as error:
                raise self._damaged(in_words(error)) from error
            yield batch

    def wrong_rows(self) -> Iterator[tuple[int, str]]:
        """The rows that `row` refuses, ascending, and why, in words that follow the file's name.

        Raises:
            DataError: the file is damaged.
        """
        for number in range(self._file.num_batches):
            for index, reason in self._batch(number).wrong_rows(len(self.class_names)):
                yield number * self._header.rows_per_batch + index, reason

    def absolute_path(self, row: ManifestRow) -> Path:
        """Where the row's file is, resolved against the manifest's folder."""
        return self.folder / decode_path(row.path)

    def printable_path(self, index: int) -> str:
        """How messages name the video of a row; where its path is damaged, by its number."""
        try:
            return printable(self.path_at(index))
        except VideoError:
            return f"row {index} of {printable(self.path)}"

    def verify(self) -> None:
        """Read everything once, compare it with the fingerprint, and check each row.

        Raises:
            DataError: the content is not what was written, or the values of a row cannot be those of a video.
        """
        self.verify_fingerprint()
        for _ in self.record_batches():
            pass
        for number in range(self._file.num_batches if self.weighted else 0):
            self._check_widths(number)

    def verify_fingerprint(self) -> None:
        """Read everything once and compare it with the fingerprint.

        Raises:
            DataError: the content is not what was written.
        """
        digest = Fingerprint(self._file.reader.schema.names)
        for batch in self.batch_slices():
            digest.update(batch)
        found = digest.hexdigest(self.class_names)
        if found != self.fingerprint:
            raise self._damaged(
                f"its content has fingerprint {found[:12]}, its header says {self.fingerprint[:12]}."
            )

    def is_copy_of(self, other: Manifest) -> bool:
        """Whether both hold the same. All of this one is read, of the other one what its header says.

        Raises:
            DataError: the content of this one is not what was written.
        """
        if self._header != other._header:
            return False
        self.verify_fingerprint()
        return True

    def _place(self, index: int) -> tuple[Columns, int]:
        """The record batch of a row, and its place there."""
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {printable(self.path)}, which has {self._rows} rows")
        number, inside = divmod(int(index), self._header.rows_per_batch)
        return self._batch(number), inside

    def _batch(self, number: int) -> Columns:
        columns = self._columns.get(number)
        if columns is None:
            try:
                columns = Columns(self._file.batch(number), self._header.batch_rows(number))
            except ARROW_ERRORS as error:
                raise self._damaged(in_words(error)) from error
            self._columns[number] = columns
        return columns

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{printable(self.path)} is damaged: {why} {AGAIN}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.folder, self.fingerprint)


def write_manifest(
    path: str | Path, rows: Iterable[ManifestRow], class_names: Sequence[str], *, weighted: bool = False
) -> Manifest:
    """Write `rows` in their order and open the result.

    Memory is bounded by one record batch. The file appears under its name only when it is complete; a
    manifest that was there before stays untouched until then.

    Args:
        weighted: keep the rows' weights; without, they are not looked at.

    Raises:
        DataError: the file cannot be written, which shows before the first row is asked for; a class name is
            empty or given twice, a label is not an index of `class_names`, or a weight is negative or no
            number, or all are 0.
    """
    schema = _without_sums(WEIGHTED_SCHEMA) if weighted else SCHEMA
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
    if not all(names):
        raise DataError("a class name is empty; each class needs one")
    if len(set(names)) != len(names):
        repeated = sorted({name for name in names if names.count(name) > 1})
        raise DataError(f"class names must differ; given more than once: {', '.join(repeated)}")
    with _temporary(path, "body") as body, _temporary(path, "whole") as whole:
        # The fingerprint stands in the schema, at the head of the file, and is known only after the last row:
        # the batches are written once to be hashed, and once behind their final header.
        with _opened(body, path) as sink:
            iterator = iter(batches)
            first = next(iterator, None)
            weighted = first is not None and "weight" in first.schema.names
            schema = WEIGHTED_SCHEMA if weighted else SCHEMA
            digest = Fingerprint(schema.names)
            total = Fraction()
            with pa.ipc.new_file(sink, schema) as writer:
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


def _record_batches(rows: Iterable[ManifestRow], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
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
        with suppress(OSError):  # none was made where the folder cannot be written
            temporary.unlink()


def _opened(file: Path, path: Path) -> BinaryIO:
    """`file`, beside the manifest `path`, to be written.

    Raises:
        DataError: it cannot be, nor can the manifest then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        return file.open("wb")
    except OSError as error:
        raise DataError(f"{printable(path)} cannot be written: {error.strerror}") from error


def _reopen(path: Path, folder: Path, fingerprint: str) -> Manifest:
    manifest = Manifest.open(path, folder)
    if manifest.fingerprint != fingerprint:
        raise DataError(f"{printable(path)} was replaced by another manifest while a run was using it")
    return manifest
