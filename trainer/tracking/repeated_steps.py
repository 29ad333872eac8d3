"""Steps that a run does again after it went back to a checkpoint: which of their values MLflow gets."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from trainer.tracking.outbox import Record

_STEP = re.compile(rb'"kind": "metrics", "step": (\d+)')
_START = re.compile(rb'"kind": "status", "status": "RUNNING", "step": (\d+)')


@dataclass(frozen=True)
class SentValue:
    """The one value of a metric at a step that is sent: where its line ends in the spool, and the value."""

    end: int
    value: float


class RepeatedSteps:
    """Chooses one line for each metric and step that stand in a spool more than once.

    MLflow stores a step twice where time or value differ, and deletes nothing. So the first line is sent,
    which may be there already. Of lines that were recorded before the MLflow run began (`base`, bytes of the
    spool) the last is sent: the run has none of them, and the last one belongs to the weights that go on.

    The choice depends on the spool and `base` alone, so a delivery that is interrupted goes on with the same.
    """

    def __init__(self, lines_path: Path, base: int) -> None:
        self._base = base
        self._chosen: dict[tuple[str, int], SentValue] = {}
        self._windows = _windows(lines_path)
        if self._windows:
            self._read(lines_path)

    def choose(self, record: Record, end: int) -> dict[str, SentValue]:
        """Of a record of metrics whose line ends at `end`: what is sent in place of the values it repeats."""
        step = record["step"]
        if not any(first <= step <= last for first, last in self._windows):
            return {}
        found = {}
        for key, value in record["values"].items():
            chosen = self._chosen.setdefault((key, step), SentValue(end, float(value)))
            if chosen.end != end:
                found[key] = chosen
        return found

    def _read(self, lines_path: Path) -> None:
        end = 0
        with lines_path.open("rb") as file:
            for line in file:
                end += len(line)
                match = _STEP.search(line)
                if match is None or not line.endswith(b"\n"):
                    continue
                step = int(match[1])
                if not any(first <= step <= last for first, last in self._windows):
                    continue
                try:
                    values = {key: float(value) for key, value in json.loads(line)["values"].items()}
                except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                    continue  # a torn line, or a damaged one
                for key, value in values.items():
                    if end <= self._base:
                        self._chosen[key, step] = SentValue(end, value)
                    else:
                        self._chosen.setdefault((key, step), SentValue(end, value))


def _windows(lines_path: Path) -> list[tuple[int, int]]:
    """Ranges of steps, disjoint and rising, that were done more than once: first and last of each.

    A start that goes on after step s may repeat s itself, an evaluation, up to the last step before it.
    """
    reached = -1
    windows: list[tuple[int, int]] = []
    with lines_path.open("rb") as file:
        for line in file:
            if (match := _STEP.search(line)) is not None:
                reached = max(reached, int(match[1]))
            elif (match := _START.search(line)) is not None and int(match[1]) <= reached:
                windows.append((int(match[1]), reached))
    merged: list[tuple[int, int]] = []
    for first, last in sorted(windows):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
