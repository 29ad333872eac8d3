"""A text table with a video and its label a line: `path,label` as CSV, or `path label` with a space between.

The label is a class name or an index. A first line that says `path,label` is a header. With spaces, the label
is what follows the last one, so that paths may hold some. A header `path,label,weight` announces a third
column; without that header, a third field is more likely a path with a comma that lacks its quotes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import DataError
from pipelines.datasets.listing import Listing, unknown_class

# No data set has so many; a greater index is another column taken for the label.
_MOST_CLASSES = 1_000_000

_WEIGHTED_HEADER = ["path", "label", "weight"]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of the table, as it was written; an empty weight where the table has no such column."""

    number: int
    path: str
    label: str
    weight: str


def read_table(table: Path, root: Path | None = None, class_names: Sequence[str] | None = None) -> Listing:
    """The videos of a table, in its order.

    Args:
        root: what the paths are relative to; by default the table's folder.
        class_names: the classes in the order of their labels. By default, where all labels are indices, their
            digits from 0 to the greatest, otherwise all names that occur, sorted.

    Raises:
        DataError: the table cannot be read, or a line is wrong; the message names file and line.
    """
    root = table.parent if root is None else root
    lines = _read_lines(table)
    if not lines:
        raise DataError(f"{table}: holds no video")
    names = _names_found(table, lines) if class_names is None else tuple(class_names)
    labels = {name: index for index, name in enumerate(names)}
    videos = []
    for line in lines:
        label = labels.get(line.label)
        # A name comes first: a class may be called "7".
        if label is None and _is_index(line.label):
            if int(line.label) >= len(names):
                raise DataError(
                    f"{table}, line {line.number}: label {line.label}, but labels end at {len(names) - 1}"
                )
            label = int(line.label)
        if label is None:
            raise DataError(f"{table}, line {line.number}: {unknown_class(line.label, names)}")
        videos.append((root / line.path, label))
    return Listing(videos, names, _weights(table, lines))


def _names_found(table: Path, lines: list[_Line]) -> tuple[str, ...]:
    indices = _is_index(lines[0].label)
    for line in lines:
        place = f"{table}, line {line.number}"
        if _is_index(line.label) != indices:
            kinds = ("a name", "an index") if indices else ("an index", "a name")
            raise DataError(f"{place}: label {line.label!r} is {kinds[0]}, the first is {kinds[1]}")
        if indices and int(line.label) >= _MOST_CLASSES:
            raise DataError(f"{place}: label {line.label} is more than {_MOST_CLASSES - 1}")
    if not indices:
        return tuple(sorted({line.label for line in lines}))
    return tuple(str(index) for index in range(1 + max(int(line.label) for line in lines)))


def _weights(table: Path, lines: list[_Line]) -> list[float] | None:
    """The third column as numbers; None where there is none."""
    if not lines[0].weight:
        return None
    weights = []
    for line in lines:
        try:
            weight = float(line.weight)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight >= 0):
            raise DataError(
                f"{table}, line {line.number}: weight {line.weight!r}; a weight is a number, 0 or more"
            )
        weights.append(weight)
    if not any(weights):
        raise DataError(f"{table}: all weights are 0, so no video could be drawn; give some a weight above 0")
    return weights


def _read_lines(table: Path) -> list[_Line]:
    """Every line that is not blank, without the header."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if "," in first:
                header = [field.strip().lower() for field in first.split(",")]
                reader = csv.reader(file, skipinitialspace=True, strict=True)
                fields = [(reader.line_num, [field.strip() for field in row]) for row in reader]
            else:
                header = first.lower().split()
                most = 2 if header == _WEIGHTED_HEADER else 1
                fields = [(n, line.rsplit(maxsplit=most)) for n, line in enumerate(file, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a table of videos: {error}") from error
    weighted = header == _WEIGHTED_HEADER
    if weighted or header == _WEIGHTED_HEADER[:2]:
        del fields[0]
    lines = []
    for number, row in fields:
        if not any(row):
            continue
        if len(row) != (3 if weighted else 2) or not all(row):
            expected = "a path, a label and a weight" if weighted else "a path and a label"
            hint = "" if weighted else " A column of weights needs the header path,label,weight."
            raise DataError(
                f"{table}, line {number}: expected {expected}, found {len(row)} field(s). "
                f"A path with a comma stands in double quotes.{hint}"
            )
        lines.append(_Line(number, row[0].strip(), row[1], row[2] if weighted else ""))
    return lines


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()
