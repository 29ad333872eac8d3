"""Steps that a run repeats after it resumed from a checkpoint: which value of each is sent to MLflow."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from trainer.tracking.outbox import Record

_STEP = re.compile(rb'"kind": "metrics", "step": (\d+)')
_START = re.compile(rb'"kind": "status", "status": "RUNNING", "step": (\d+)')


@dataclass(frozen=True)
class SentValue:
    """The value of a metric at a step that is sent.

    end: offset in the outbox at which its line ends.
    """

    end: int
    value: float


class RepeatedSteps:
    """Chooses one line for each metric and step that the outbox holds more than once.

    MLflow stores two values of a step if time or value differ, and deletes none. So the first line is sent,
    which MLflow may have already. Of the lines before `base`, the outbox offset at which the MLflow run
    began, the last is sent: MLflow has none of them, and the last belongs to the weights that training
    continued with.

    The choice depends on the outbox and `base` alone, so an interrupted upload continues with the same
    values.
    """

    def __init__(self, lines_path: Path, base: int) -> None:
        self._base = base
        self._chosen: dict[tuple[str, int], SentValue] = {}
        self._windows = _windows(lines_path)
        if self._windows:
            self._read(lines_path)

    def choose(self, record: Record, end: int) -> dict[str, SentValue]:
        """For a metrics record whose line ends at `end`: the values that other lines send for it."""
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
                    continue  # an incomplete or damaged line
                for key, value in values.items():
                    if end <= self._base:
                        self._chosen[key, step] = SentValue(end, value)
                    else:
                        self._chosen.setdefault((key, step), SentValue(end, value))


def _windows(lines_path: Path) -> list[tuple[int, int]]:
    """Ranges (first, last) of repeated steps, disjoint and ascending.

    A start that continues after step s repeats the steps after s, and s itself if it evaluates again.
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
