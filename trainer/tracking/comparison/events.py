"""Reads a run's `events.jsonl` as a stream: millions of lines take seconds and little memory.

A line may be cut off, damaged, or of any length.
"""

import hashlib
import math
import re
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.text_file import open_ordinary
from trainer.monitoring.metric_names import LOSS_STEPS
from trainer.system.files import find_number, parse_records
from trainer.tracking.comparison.runs import Curve, RecordedEvaluation

_LONGEST = 2**16  # bytes of a line; a step's has about 400
_STEP = b'{"event": "step"'
"""The start of a step's line. Nearly all lines are steps, and most need not be parsed."""
_HASHED = re.compile(_STEP + rb'[^{}]*?"step": (\d{1,15}), [^{}]*?"batch_hash": "([0-9a-f]{16})"[^{}]*\}\Z')
"""Such a line as `Record` writes it, with its step and hash."""
MOST_EVALUATIONS = 100_000
POINTS = 1000  # of a curve, at most


@dataclass
class RunEvents:
    """What a table needs of a run's events."""

    evaluations: list[RecordedEvaluation]
    """By step."""
    last_step: dict[str, Any] | None
    """The event of the last step."""
    train_loss: float | None
    """Mean of the last `LOSS_STEPS` steps, without those whose loss is not finite."""
    started: dict[str, Any] | None
    """The last event of a start."""
    too_many: bool
    """Whether evaluations beyond `MOST_EVALUATIONS` were ignored."""


def read_events(path: Path) -> RunEvents:
    """Read what a table needs. Of a step that was repeated after a restart, the later evaluation counts.

    Raises OSError where the file cannot be read, ValueError where it is not an ordinary file.
    """
    found: dict[int, RecordedEvaluation] = {}
    started, too_many = None, False
    last: deque[bytes] = deque(maxlen=LOSS_STEPS)
    for line in event_lines(path):
        if line.startswith(_STEP):
            last.append(line)
            continue
        event = _event(line)
        if event is None:
            continue
        if event.get("event") == "start":
            started = event
            first = find_number(event, "step")
            if first is not None:  # later steps are repeated
                found = {step: evaluation for step, evaluation in found.items() if step <= first}
            if first == 0:
                last.clear()
        elif event.get("event") == "evaluation" and (evaluation := _evaluation(event)) is not None:
            too_many = too_many or len(found) >= MOST_EVALUATIONS
            if not too_many:
                found[evaluation.step] = evaluation
        elif event.get("event") == "step":
            last.append(line)
    steps = _steps(last)
    losses = [loss for event in steps if (loss := find_number(event, "loss")) is not None]
    return RunEvents(
        [found[step] for step in sorted(found)],
        steps[0] if steps else None,
        math.fsum(losses) / len(losses) if losses else None,
        started,
        too_many,
    )


def _steps(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    """The steps of these lines, the last one first; of a repeated step, the later line.

    A damaged line, such as one that a running process has not completed, is ignored.
    """
    found: list[dict[str, Any]] = []
    earliest = math.inf
    for line in reversed(lines):
        event = _event(line)
        step = None if event is None else find_number(event, "step")
        if event is not None and step is not None and step < earliest:
            found.append(event)
            earliest = step
    return found


def read_curve(path: Path, points: int = POINTS) -> Curve | None:
    """The losses of at most `points` steps, evenly spaced, thinned while reading; None without a step.

    Raises as `read_events`.
    """
    rows: list[tuple[float, ...]] = []
    stride, number = 1, 0
    for line in event_lines(path):
        if not line.startswith(_STEP):
            continue
        number += 1
        if number % stride:
            continue
        event = _event(line)
        step = None if event is None else find_number(event, "step")
        if event is None or step is None:
            continue
        while rows and rows[-1][0] >= step:  # repeated after a restart
            rows.pop()
        values = (find_number(event, name) for name in ("loss", "spent", "device_seconds"))
        rows.append((step, *(float("nan") if value is None else value for value in values)))
        if len(rows) > points:
            rows, stride = rows[1::2], 2 * stride
    if not rows:
        return None
    steps, loss, seconds, device_seconds = np.array(rows).T
    return Curve(steps, loss, seconds / 3600, device_seconds / 3600)


def batch_hashes(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """(N,) steps, ascending, and (N,) 64-bit digests of their `batch_hash`; None where no step has one.

    16 bytes per step. Of a repeated step, the last line counts. Raises as `read_events`.
    """
    steps, digests = array("q"), array("Q")
    for line in event_lines(path):
        if not line.startswith(_STEP):
            continue
        match = _HASHED.match(line)  # 3 us, JSON takes 11, and a run may have millions
        if match is not None:
            steps.append(int(match[1]))
            digests.append(int(match[2], 16))
            continue
        event = _event(line) if b'"batch_hash"' in line else None
        step = None if event is None else find_number(event, "step")
        if event is not None and step is not None and event.get("batch_hash") is not None:
            text = str(event["batch_hash"]).encode(errors="replace")
            steps.append(int(step))
            digests.append(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
    if not steps:
        return None
    of_step, of_digest = np.array(steps)[::-1], np.array(digests)[::-1]
    unique, indices = np.unique(of_step, return_index=True)
    return unique, of_digest[indices]


def event_lines(path: Path) -> Iterator[bytes]:
    """The lines of an ordinary file, without those longer than any event."""
    with open_ordinary(path) as file:
        begins = True  # whether the next bytes begin a line
        for part in iter(lambda: file.readline(_LONGEST + 1), b""):
            ends = part.endswith(b"\n")
            if begins and (ends or len(part) <= _LONGEST):
                yield part.removesuffix(b"\n")
            begins = ends


def _event(line: bytes) -> dict[str, Any] | None:
    return next(parse_records(line.decode(errors="replace")), None)


def _evaluation(event: dict[str, Any]) -> RecordedEvaluation | None:
    step, top1, top5 = (find_number(event, name) for name in ("step", "top1", "top5"))
    if step is None or top1 is None or not 0 <= top1 <= 1:
        return None
    top5 = top5 if top5 is not None and 0 <= top5 <= 1 else None
    return RecordedEvaluation(int(step), top1, top5, find_number(event, "loss"))
