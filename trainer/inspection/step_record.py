"""Finds one step in a run's events, a file of millions of lines, with bounded memory."""

import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.system.files import find_number, parse_records

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


def find_step(events: Path, step: int) -> StepRecord | None:
    """The last record of `step`, from 1 as in the events; None if there is none.

    Searches the file backwards, so that late steps are found quickly. Raises OSError.
    """
    with open(events, "rb") as file:
        size = file.seek(0, 2)
        if size == 0:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            found = _last_record(lines, b"step", b'"step": %d, ' % step, size)
            if found is None:
                return None
            place, record = found
            started = _last_record(lines, b"start", b'"start"', place)
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


def _last_record(
    lines: mmap.mmap, kind: bytes, text: bytes, before: int
) -> tuple[int, dict[str, Any]] | None:
    """Offset and record of the last complete line of an event that has a text before byte `before`."""
    beginning = b'{"event": "%s"' % kind  # as `RunDir.append_event` writes it
    place = before
    while (place := lines.rfind(text, 0, place)) >= 0:
        begin, end = lines.rfind(b"\n", 0, place) + 1, lines.find(b"\n", place)
        if lines[begin : begin + len(beginning)] == beginning and 0 < end - begin < _LONGEST_LINE:
            for record in parse_records(lines[begin:end].decode(errors="replace")):
                return begin, record
    return None


def _pairs(value: Any) -> tuple[tuple[str, str], ...] | None:
    """Path and fingerprint of each manifest; None if the value is invalid."""
    if not isinstance(value, list):
        return None
    pairs = [tuple(pair) for pair in value if isinstance(pair, list) and len(pair) == 2]
    if len(pairs) != len(value) or not all(isinstance(text, str) for pair in pairs for text in pair):
        return None
    return tuple(pairs)
