"""A run's outbox for the tracking server: lines on disk, and how far they have been delivered.

`mlflow.jsonl` grows by one JSON line per record and is never rewritten; `mlflow.offset` holds the number
of its bytes that are delivered. A process that dies leaves both behind, and whoever comes next goes on
from there.
"""

import fcntl
import json
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from trainer.system.files import append, open_for_append, write_text

Record = dict[str, Any]


class Outbox:
    """The outbox of one run directory. Appending is safe from any thread of one process."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.lines_path = run_dir / "mlflow.jsonl"
        self._offset_path = run_dir / "mlflow.offset"
        self.rejected_path = run_dir / "mlflow.rejected.jsonl"
        self._writing = threading.Lock()
        self._file: BinaryIO | None = None

    def append(self, record: Record) -> None:
        """Add one record and hand it to the operating system; some 0.05 ms.

        Raises:
            OSError: the disk is full or gone.
        """
        line = _line(record)
        with self._writing:
            if self._file is None:
                self._file = open_for_append(self.lines_path)
            append(self._file, line)

    def undelivered(self) -> Iterator[tuple[int, bytes]]:
        """Complete lines that are not delivered, each with the offset at which it ends."""
        if not self.lines_path.exists():
            return
        with self.lines_path.open("rb") as file:
            end = self.delivered_bytes()
            file.seek(end)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield end, line

    def count_undelivered(self) -> int:
        """Lines that are not delivered."""
        return sum(1 for _ in self.undelivered())

    def count_lines(self) -> int:
        """Complete lines, delivered or not."""
        if not self.lines_path.exists():
            return 0
        with self.lines_path.open("rb") as file:
            return sum(line.endswith(b"\n") for line in file)

    def delivered_bytes(self) -> int:
        """Bytes of the spool that are delivered."""
        try:
            offset = int(self._offset_path.read_bytes()[:32])
            with self.lines_path.open("rb") as file:
                # Somebody who deletes the spool means to begin anew.
                if not 0 < offset <= file.seek(0, os.SEEK_END):
                    return 0
                file.seek(offset - 1)
                return offset if file.read(1) == b"\n" else 0
        except (FileNotFoundError, ValueError):  # a damaged offset: MLflow stores a value once
            return 0

    def size(self) -> int:
        """Bytes of the spool, delivered or not."""
        return self.lines_path.stat().st_size if self.lines_path.exists() else 0

    def mark_delivered(self, offset: int) -> None:
        """Record, atomically, that everything before `offset` is delivered."""
        write_text(self._offset_path, f"{offset}\n", sync=False, shared=True)

    def reject(self, record: Record, reason: str) -> None:
        """Put aside what the server will never take, with its reason."""
        with self.rejected_path.open("ab") as file:
            file.write(_line({**record, "reason": reason}))

    @contextmanager
    def delivery_lock(self) -> Iterator[bool]:
        """Hold the right to deliver; yields False where another process has it.

        A file system without locks lets everybody deliver: MLflow stores one metric value once, however
        often it comes.
        """
        with self.lines_path.open("ab") as file:
            mine = True
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                mine = not isinstance(error, BlockingIOError)
            yield mine


def _line(record: Record) -> bytes:
    text = json.dumps(_strict(record), allow_nan=False, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8: JSON has escapes for its bytes
        return (json.dumps(_strict(record), allow_nan=False) + "\n").encode()


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they travel as text that `float` reads."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
