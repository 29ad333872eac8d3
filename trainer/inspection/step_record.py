"""Finds one step in a run's events, a file of millions of lines, with bounded memory."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.system.files import find_number, parse_records

_BLOCK = 2**22  # bytes read at once
_LONGEST_LINE = 2**24  # bytes; no run writes a longer line


@dataclass(frozen=True)
class StepRecord:
    """The last record of a step; a step that was repeated after a crash has several. None for missing values.

    batch_hash: of the step's clips.
    time: seconds since 1970.
    device, world_size: of the start that did the step.
    manifests: path and fingerprint of each training manifest of that start.
    """

    batch_hash: str | None
    time: float | None
    device: str | None
    world_size: int | None
    manifests: tuple[tuple[str, str], ...] | None


def find_step(
    events: Path, step: int, progress: Callable[[int, int], None] | None = None
) -> StepRecord | None:
    """The last record of `step`, from 1 as in the events; None if there is none.

    Reads the file backwards, so that late steps are found quickly. progress: called with (bytes read, all
    bytes) every few MiB. Raises OSError.
    """
    found = _last_line(events, _event("step", rb'"step": %d, ' % step), progress=progress)
    if found is None:
        return None
    place, record = found
    started = _last_line(events, _event("start", b""), before=place)
    start = {} if started is None else started[1]
    manifests = start.get("train_manifests")
    batch_hash, device, ranks = record.get("batch_hash"), start.get("device"), start.get("world_size")
    return StepRecord(
        batch_hash if isinstance(batch_hash, str) else None,
        find_number(record, "time"),
        device if isinstance(device, str) else None,
        ranks if type(ranks) is int else None,
        _pairs(manifests),
    )


def _event(kind: str, values: bytes) -> re.Pattern[bytes]:
    """A line as `RunDir.append_event` writes it, whose values begin with `values`."""
    return re.compile(
        rb'^\{"event": "%s", "time": [0-9.]+, %s[^\n]*$' % (kind.encode(), values), re.MULTILINE
    )


def _last_line(
    path: Path,
    pattern: re.Pattern[bytes],
    before: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """Offset and record of the last complete line that matches and begins before byte `before`."""
    with open(path, "rb") as file:
        size = end = file.seek(0, 2) if before is None else before
        head = b""  # the incomplete line at the beginning of the previous block
        while end > 0:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            data = file.read(end - begin) + head
            first = data.find(b"\n") + 1 if begin else 0
            for match in reversed(list(pattern.finditer(data, first))):
                for record in parse_records(match.group().decode(errors="replace")):
                    return begin + match.start(), record
            head = data[: first or len(data)]
            if len(head) > _LONGEST_LINE:
                head = b""
            end = begin
            if progress is not None:
                progress(size - end, size)
    return None


def _pairs(value: Any) -> tuple[tuple[str, str], ...] | None:
    """Path and fingerprint of each manifest; None if the value is invalid."""
    if not isinstance(value, list):
        return None
    pairs = [tuple(pair) for pair in value if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(value) or not all(isinstance(text, str) for pair in pairs for text in pair):
        return None
    return tuple(pairs)
