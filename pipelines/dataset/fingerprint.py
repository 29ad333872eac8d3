"""The fingerprint of a manifest's content."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa


class Fingerprint:
    """SHA-256 of a table's content, independent of how the table is divided into batches.

    Each column has its own hash, updated batch by batch. A column of strings has two, of the lengths and of
    the bytes, so that moving a character to the next row changes the fingerprint.
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
                ends = np.frombuffer(offsets, "<i4", column.offset + len(column) + 1)[column.offset :]
                fixed.update(np.diff(ends).tobytes())
                if data is not None:
                    variable.update(memoryview(data)[ends[0] : ends[-1]])
            else:
                fixed.update(np.from_dlpack(column).tobytes())

    def hexdigest(self, class_names: Sequence[str]) -> str:
        columns = {name: [part.hexdigest() for part in parts] for name, parts in self._columns.items()}
        content = {"rows": self.rows, "columns": columns, "class_names": list(class_names)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
