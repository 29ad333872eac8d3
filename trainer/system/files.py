"""Files written as a whole, and files of JSON lines: append, repair of a torn last line, reading."""

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pipelines.atomic_file import atomic_file

_log = logging.getLogger(__name__)


def write_bytes(path: Path, content: bytes, *, sync: bool = True, shared: bool = False) -> None:
    """Write a file atomically; `sync` and `shared` as for `atomic_file`. Raises OSError."""
    with atomic_file(path, sync=sync, shared=shared) as partial:
        partial.write_bytes(content)


def write_text(path: Path, text: str, *, sync: bool = True, shared: bool = False) -> None:
    """As `write_bytes`, in UTF-8; a lone surrogate becomes an escape."""
    write_bytes(path, text.encode(errors="backslashreplace"), sync=sync, shared=shared)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """As `write_text`, see `format_json`."""
    write_text(path, format_json(values) + "\n")


def format_json(values: dict[str, Any]) -> str:
    """JSON on several lines; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(map_leaves(values, _finite), indent=2, ensure_ascii=False)


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where the file is missing, damaged or holds another kind of value."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class BestEffort:
    """Lets writes of secondary files fail: the first failure of each file is logged, the run continues.

    Only rank 0 writes these files; if it raised, the other ranks would wait for it in a collective.

        with best_effort(path):
            path.write_text(...)
    """

    def __init__(self) -> None:
        self._failed: set[Path] = set()

    @contextmanager
    def __call__(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if path not in self._failed:
                _log.warning(
                    "cannot write %s (%s): the run continues without", path, error.strerror or str(error)
                )
            self._failed.add(path)
        else:
            self._failed.discard(path)


def append_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Append records as JSON lines, in one write: a crash cuts off the last line at most.

    Raises OSError where they cannot be written; then none of them is in the file.
    """
    text = "".join(json.dumps(map_leaves(record, _finite), ensure_ascii=False) + "\n" for record in records)
    if text:
        with open_for_append(path) as file:
            append(file, text.encode(errors="backslashreplace"))  # a lone surrogate, as JSON escapes it


def open_for_append(path: Path) -> BinaryIO:
    """Open a file of lines, unbuffered, and end its last line where a crash cut that off. Raises OSError."""
    file = path.open("ab+", buffering=0)
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    return cast(BinaryIO, file)


def append(file: BinaryIO, data: bytes) -> None:
    """Append to an unbuffered file. Raises OSError where it cannot write all; the file is then unchanged."""
    end = file.seek(0, os.SEEK_END)
    try:
        if file.write(data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
    except OSError:
        file.truncate(end)
        raise


def parse_records(text: str) -> Iterator[dict[str, Any]]:
    """The records of JSON lines. Skips cut-off lines and those that `append_lines` would not write, such as
    one with a number outside of float64 or int64.
    """
    for line in text.split("\n"):
        try:
            record = json.loads(line, parse_float=_float, parse_int=_integer, parse_constant=_float)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def find_number(record: Mapping[str, Any], key: str, most: float = 1e15) -> float | None:
    """A record's number; None where there is none, or its absolute value is above `most`."""
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > most:
        return None
    return float(value)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _integer(text: str) -> int:
    value = int(text)
    if abs(value) >= 2**63:
        raise ValueError(text)
    return value


def map_leaves(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same mappings and lists, with each value inside them changed."""
    if isinstance(value, dict):
        return {name: map_leaves(inner, change) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [map_leaves(inner, change) for inner in value]
    return change(value)


def is_nonfinite(value: Any) -> bool:
    """Whether a value is NaN or infinite."""
    return isinstance(value, float) and not math.isfinite(value)


def _finite(value: Any) -> Any:
    return None if is_nonfinite(value) else value
