"""A text table with a video and its label a line: `path,label` as CSV, or `path label` with a space between.

The label is a class name or an index. A first line that says `path,label` is a header. With spaces, the label
is what follows the last one, so that paths may hold some.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from pipelines import DataError
from pipelines.datasets.listing import Listing, unknown_class

# No data set has so many; a greater index is another column taken for the label.
_MOST_CLASSES = 1_000_000


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
    for number, path, text in lines:
        label = labels.get(text)
        # A name comes first: a class may be called "7".
        if label is None and _is_index(text):
            if int(text) >= len(names):
                raise DataError(f"{table}, line {number}: label {text}, but labels end at {len(names) - 1}")
            label = int(text)
        if label is None:
            raise DataError(f"{table}, line {number}: {unknown_class(text, names)}")
        videos.append((root / path, label))
    return Listing(videos, names)


def _names_found(table: Path, lines: list[tuple[int, str, str]]) -> tuple[str, ...]:
    indices = _is_index(lines[0][2])
    for number, _, label in lines:
        if _is_index(label) != indices:
            kinds = ("a name", "an index") if indices else ("an index", "a name")
            raise DataError(f"{table}, line {number}: label {label!r} is {kinds[0]}, the first is {kinds[1]}")
        if indices and int(label) >= _MOST_CLASSES:
            raise DataError(f"{table}, line {number}: label {label} is more than {_MOST_CLASSES - 1}")
    if not indices:
        return tuple(sorted({label for *_, label in lines}))
    return tuple(str(index) for index in range(1 + max(int(label) for *_, label in lines)))


def _read_lines(table: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of every line that is not blank, without the header."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if "," in first:
                reader = csv.reader(file, skipinitialspace=True, strict=True)
                fields = [(reader.line_num, [field.strip() for field in row]) for row in reader]
            else:
                fields = [(n, line.rsplit(maxsplit=1)) for n, line in enumerate(file, start=1)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a table of videos: {error}") from error
    if fields and [field.lower() for field in fields[0][1]] == ["path", "label"]:
        del fields[0]
    lines = []
    for number, row in fields:
        if not any(row):
            continue
        if len(row) != 2 or not all(row):
            raise DataError(
                f"{table}, line {number}: expected a path and a label, found {len(row)} field(s). "
                "A path with a comma stands in double quotes."
            )
        lines.append((number, row[0].strip(), row[1]))
    return lines


def _is_index(label: str) -> bool:
    return label.isascii() and label.isdigit()
