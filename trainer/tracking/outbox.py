"""A run's outbox: records on disk that wait for MLflow.

Each record is one JSON line appended to `mlflow.jsonl`, which is never rewritten. `mlflow.offset` holds the
number of bytes that are delivered. After a crash, the next process continues from that offset.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trainer.system.files import append, is_nonfinite, map_leaves, open_for_append, write_text

Record = dict[str, Any]


class Outbox:
    """The outbox of one run directory. `append` is thread-safe within one process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lines_path = run_dir / "mlflow.jsonl"
        self._offset_path = run_dir / "mlflow.offset"
        self.rejected_path = run_dir / "mlflow.rejected.jsonl"
        self._writing = threading.Lock()
        self._file: BinaryIO | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files of the outbox."""
        return self.lines_path, self._offset_path, self.rejected_path

    def append(self, record: Record) -> None:
        """Write one record to the file, in about 0.05 ms. Raises OSError if the disk is full or missing."""
        line = _line(record)
        with self._writing:
            if self._file is None:
                self._file = open_for_append(self.lines_path)
            append(self._file, line)

    def undelivered(self) -> Iterator[tuple[int, bytes]]:
        """Yield the complete lines that are not delivered, each with its end offset."""
        return self._lines(self.delivered_bytes())

    def _lines(self, end: int) -> Iterator[tuple[int, bytes]]:
        if not self.lines_path.exists():
            return
        with self.lines_path.open("rb") as file:
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield end, line

    def count_undelivered(self) -> int:
        """Number of complete lines that are not delivered."""
        return sum(1 for _ in self.undelivered())

    def count_lines(self) -> int:
        """Number of complete lines, delivered or not."""
        return sum(1 for _ in self._lines(0))

    def delivered_bytes(self) -> int:
        """Number of bytes that are delivered; 0 if the offset does not fit the file, as after a deletion."""
        try:
            offset = int(self._offset_path.read_bytes()[:32])
            with self.lines_path.open("rb") as file:
                if not 0 < offset <= file.seek(0, os.SEEK_END):
                    return 0
                file.seek(offset - 1)
                return offset if file.read(1) == b"\n" else 0
        except (FileNotFoundError, ValueError):  # a damaged offset: delivering a value again stores it once
            return 0

    def size(self) -> int:
        """Size of `mlflow.jsonl` in bytes."""
        return self.lines_path.stat().st_size if self.lines_path.exists() else 0

    def mark_delivered(self, offset: int) -> None:
        """Store atomically that all bytes before `offset` are delivered."""
        write_text(self._offset_path, f"{offset}\n", sync=False, shared=True)

    def reject(self, record: Record, reason: str) -> None:
        """Append a record that MLflow refuses to `mlflow.rejected.jsonl`, with the reason."""
        with self.rejected_path.open("ab") as file:
            file.write(_line({**record, "reason": reason}))

    @contextmanager
    def delivery_lock(self) -> Iterator[bool]:
        """Lock the outbox for delivery; yields False if another process holds the lock.

        On a file system without locks it yields True: MLflow stores a value once even if it is sent twice.
        """
        with self.lines_path.open("ab") as file:
            is_locked = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                is_locked = not isinstance(error, BlockingIOError)
            yield is_locked


def _line(record: Record) -> bytes:
    # JSON lacks NaN and infinity: `float` parses their text.
    strict = map_leaves(record, lambda value: str(value) if is_nonfinite(value) else value)
    try:
        return (json.dumps(strict, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: its bytes are escaped
        return (json.dumps(strict, allow_nan=False) + "\n").encode()
