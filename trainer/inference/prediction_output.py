"""Prints predictions as tables, JSON lines or CSV, each at once."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from models.weights.safetensors_header import shorten
from pipelines.dataset.prepare.class_names import printable_class
from pipelines.formatting import printable
from trainer.inference.prediction import Prediction, Timeline, Top
from trainer.system.formatting import format_video_time
from trainer.system.terminal import PipeConsole

_BAR = 24  # columns
_NOT_PLAIN = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

FIELDS = ("path", "start", "end", "rank", "class", "probability", "error")
"""Columns of the CSV."""


class JsonWriter:
    """One JSON line per video. It has `error` if the video, or the rest of it, is unusable."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, found: Prediction | Timeline) -> None:
        if isinstance(found, Prediction):
            values: dict[str, Any] = {} if found.error else {"top": _named(found.top)}
        else:
            segments = [
                {"start": _time(each.start), "end": _time(each.end), **_share(each.name, each.probability)}
                for each in found.segments
            ]
            windows = [
                {"start": _time(each.start), "end": _time(each.end), "top": _named(each.top)}
                for each in found.windows
            ]
            values = {"segments": segments, "windows": windows}
        error = {"error": printable(found.error)} if found.error else {}
        line = {"path": printable(found.path), **values, **error}
        text = json.dumps(line, ensure_ascii=False)
        # A class name may contain control characters for a terminal: JSON escapes keep the name the same.
        print(_NOT_PLAIN.sub(lambda found: f"\\u{ord(found[0]):04x}", text), file=self._file, flush=True)


class CsvWriter:
    """One CSV line per printed class of a video or of a window; the columns are `FIELDS`."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._csv = csv.writer(file, lineterminator="\n")
        self._csv.writerow(FIELDS)

    def write(self, found: Prediction | Timeline) -> None:
        if isinstance(found, Prediction):
            self._csv.writerows(_rows(found.path, found.top, "", ""))
        else:
            for each in found.windows:
                self._csv.writerows(_rows(found.path, each.top, _time(each.start), _time(each.end)))
        if found.error:
            self._csv.writerow([printable(found.path), "", "", "", "", "", printable(found.error)])
        self._file.flush()


class TableWriter:
    """One table per video: its classes, or the segments of its timeline."""

    def __init__(self, file: TextIO) -> None:
        self._console = PipeConsole(file=file, highlight=False, markup=False, emoji=False)

    def write(self, found: Prediction | Timeline) -> None:
        self._console.print(Text(printable(found.path), style="bold"), soft_wrap=True)
        if found.error:
            self._console.print(Text(f"  {printable(found.error)}", style="red"), soft_wrap=True)
        table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
        if isinstance(found, Prediction):
            rows: list[tuple[tuple[float, ...], str, float]]
            rows = [((), name, probability) for name, probability in found.top]
        else:
            rows = [((each.start, each.end), each.name, each.probability) for each in found.segments]
            for _ in range(2):
                table.add_column(justify="right", no_wrap=True)
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        table.add_column(width=_BAR)
        for times, name, share in rows:
            span = map(format_video_time, times)
            bar = Bar(1.0, 0.0, share, width=_BAR)
            table.add_row(*span, Text(shorten(name)), f"{100 * share:.1f} %", bar)
        self._console.print(table)


PredictionWriter = JsonWriter | CsvWriter | TableWriter


def choose_writer(kind: str, file: TextIO | None = None) -> PredictionWriter:
    """kind: `table`, `json` or `csv`. file: output; None is standard output."""
    kinds: dict[str, type[PredictionWriter]] = {"table": TableWriter, "json": JsonWriter, "csv": CsvWriter}
    return kinds[kind](file or sys.stdout)


def _time(seconds: float) -> float:
    return round(seconds, 3)


def _named(top: Top) -> list[dict[str, Any]]:
    return [_share(*each) for each in top]


def _share(name: str, probability: float) -> dict[str, Any]:
    return {"class": name, "probability": round(probability, 6)}


def _rows(path: Path, top: Top, start: float | str, end: float | str) -> Iterator[list[Any]]:
    for rank, (name, probability) in enumerate(top, start=1):
        yield [printable(path), start, end, rank, printable_class(name), f"{probability:.6f}", ""]
