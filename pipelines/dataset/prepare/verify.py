"""Checks every row of a manifest without reading its videos; of shards it asks for their sizes."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.dataset.fingerprint import Fingerprint
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.manifest_file import ARROW_ERRORS, REMAKE, arrow_message
from pipelines.dataset.prepare.duplicates import groups
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.summary import list_of
from pipelines.dataset.shards import RangeCheck
from pipelines.errors import DataError, VideoError
from pipelines.formatting import format_count, printable, wrap
from pipelines.worker_pool import Progress

_IDENTITY = ("path", "offset")
"""The columns that tell one video from another."""

_SEGMENT = ("first_frame", "frames")
"""The columns that tell one segment of a video from another."""

_MAGIC = 8  # bytes at the beginning of an Arrow file

WHOLE = "whole manifest"
OUTSIDE = "length: a range of bytes that its shard does not have"
REPEATED = "path: a video that an earlier row has with the same label"
TWO_LABELS = "path: a video that an earlier row has with another label"


@dataclass(slots=True)
class Verification:
    """What is wrong with the rows of a manifest, or with the whole file."""

    manifest: Manifest
    problems: Findings = field(default_factory=Findings)
    """By column; an item is a row."""
    wrong_rows: int = 0
    """Rows with a wrong value, and rows that cannot be read."""
    repeated_rows: int = 0
    """Rows with the video of an earlier row."""

    @property
    def is_wrong(self) -> bool:
        """Whether a row, or the file as a whole, is wrong; repeated videos are not."""
        return bool(self.wrong_rows or self.problems.counted(WHOLE))

    def write_list(self) -> None:
        """Write `<manifest>.verify.txt`, a line for each problem; without problems, delete it."""
        self.problems.write_list(list_of(self.manifest.path, "verify"))

    def summary(self) -> str:
        """The result as lines of text."""
        manifest = self.manifest
        rows, classes = format_count(len(manifest), "row"), format_count(len(manifest.class_names), "class")
        lines = [f"{printable(manifest.path)}: {rows} of {classes}"]
        if not self.problems.total:
            return "\n".join([*lines, "Every row is valid, and the content has the header's fingerprint."])
        found = []
        if self.wrong_rows:
            found.append(
                f"{format_count(self.wrong_rows, 'row')} {'is' if self.wrong_rows == 1 else 'are'} wrong"
            )
        if self.repeated_rows:
            found.append(
                f"{format_count(self.repeated_rows, 'row')} repeat{'s' * (self.repeated_rows == 1)} a video"
            )
        if self.problems.counted(WHOLE):
            found.append("the file as a whole is wrong")
        lines += wrap(f"{'; '.join(found)}. A row number counts from 0. All are listed in")
        lines += [f"  {printable(list_of(manifest.path, 'verify'))}:", *self.problems.table()]
        if self.is_wrong:
            lines += wrap(f"A run leaves out rows with wrong values, and refuses other damage. {REMAKE}")
        return "\n".join(lines)


def verify_manifest(manifest: Manifest, *, progress: Progress | None = None) -> Verification:
    """Check each value of each row, the sums of weights, the packet indexes and the fingerprint, that byte
    ranges are inside their shards, and that no video occurs twice.

    Raises StoreUnavailable where the size of a shard cannot be found out because an object store is away.

    Memory: about 50 bytes a row.

    Args:
        progress: called after each record batch with the rows checked and of all.
    """
    result = Verification(manifest)
    problems = result.problems
    digest: Fingerprint | None = Fingerprint(manifest.columns)
    keys = array("q")
    ranges = RangeCheck(manifest)
    done = 0
    for number in range(manifest.num_batches):
        rows = manifest.batch_rows(number)
        valid = np.ones(rows, bool)
        try:
            for row, column, reason in _batch_problems(manifest, number):
                valid[row - done] = False
                reason = printable(reason)
                problems.count(column, f"row {row}: {reason}")
                problems.line(f"row {row}", f"{column}: {manifest.printable_path(row)} {reason}")
            batch = manifest.read_batch(number)
        except DataError as error:
            digest = None
            if valid.all():  # otherwise its rows are listed
                valid[:] = False
                problems.count(WHOLE, f"rows {done} to {done + rows - 1}")
                problems.line(f"rows {done} to {done + rows - 1}", printable(str(error)))
            keys.extend([0] * rows)
        else:
            if digest is not None:
                digest.update(batch)
            for row, reason in ranges.problems(number, batch):
                if valid[row - done]:  # otherwise its values are listed
                    valid[row - done] = False
                    problems.count(OUTSIDE, f"row {row}: {printable(reason)}")
                    problems.line(f"row {row}", f"length: {manifest.printable_path(row)} {printable(reason)}")
            keys.frombytes(np.where(valid, row_hashes(batch, _identity(manifest)), 0).tobytes())
        result.wrong_rows += int(rows - valid.sum())
        done += rows
        if progress is not None:
            progress(done, len(manifest))
    if wrong := _head_problem(manifest):
        problems.add(WHOLE, "head", wrong)
    if digest is not None and (found := digest.hexdigest(manifest.class_names)) != manifest.fingerprint:
        problems.add(WHOLE, "header", f"fingerprint: {manifest.fingerprint}, but the content has {found}")
    if not all(manifest.class_names):
        problems.add(WHOLE, "header", "class_names: a name is empty")
    for first, row in _repeated(manifest, np.frombuffer(keys, np.int64)):
        before, after = manifest.row(first), manifest.row(row)
        kind, labels = REPEATED, ""
        if before.label != after.label:
            kind, labels = TWO_LABELS, f", with label {before.label} there and {after.label} here"
        problems.count(kind, f"row {row} is also row {first}{labels}")
        problems.line(f"row {row}", f"path: {manifest.printable_path(row)} is also row {first}{labels}")
        result.repeated_rows += 1
    return result


def _batch_problems(manifest: Manifest, number: int) -> Iterator[tuple[int, str, str]]:
    yield from manifest.row_problems(number)
    # The sum after the last row is in the next batch. If that is damaged, it is listed in its turn.
    with suppress(DataError):
        for row, reason in manifest.wrong_sums(number):
            yield row, "weight_before", reason
    first = number * manifest.rows_per_batch
    for row in range(first, first + manifest.batch_rows(number)) if manifest.has_packets else ():
        try:
            manifest.packets_at(row)
        except VideoError as defect:
            yield row, "packets", str(defect)


def _head_problem(manifest: Manifest) -> str:
    """What is wrong before the first record batch, where readers of streams find the schema; or nothing."""
    with pa.memory_map(os.fsencode(manifest.path)) as file:
        schema = pa.ipc.open_file(file).schema
        try:
            file.seek(_MAGIC)
            same = pa.ipc.read_schema(file).equals(schema, check_metadata=True)
        except ARROW_ERRORS as error:
            return printable(f"the schema before the first row cannot be read: {arrow_message(error)}")
    return "" if same else "the schema before the first row is not the one after the last"


def _identity(manifest: Manifest) -> tuple[str, ...]:
    """The columns that two rows share only if they are the same frames of the same video."""
    return _IDENTITY + _SEGMENT if _SEGMENT[0] in manifest.columns else _IDENTITY


def row_hashes(batch: pa.RecordBatch, columns: Sequence[str]) -> NDArray[np.int64]:
    """A hash of some columns for each row."""
    values = (
        batch[name].to_pylist() if pa.types.is_string(batch[name].type) else np.asarray(batch[name]).tolist()
        for name in columns
    )
    return np.fromiter(map(hash, zip(*values, strict=True)), np.int64, batch.num_rows)


def _repeated(manifest: Manifest, keys: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """For each row whose video an earlier row has: the first row with it, and the row; by the first row."""
    columns = _identity(manifest)
    for group in groups(keys):
        first_with: dict[tuple[object, ...], int] = {}
        for index in group:
            row = manifest.row(index)
            first = first_with.setdefault(tuple(getattr(row, name) for name in columns), index)
            if first != index:  # not only the same hash
                yield first, index
