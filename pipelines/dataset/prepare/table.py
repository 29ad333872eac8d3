"""Reads a text table with a video and its label per line: CSV, TSV, or `path label` separated by blanks.

A header may name the columns; without one, the first field is the path and the second the label. With blanks,
the label is what follows the last one, so that paths may contain blanks. The listing's findings have
everything that is interpreted rather than read literally (an ignored column, `\\` read as `/`).
"""

from __future__ import annotations

import csv
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.table_format import (
    Columns,
    TableFormat,
    csv_rows,
    detect_format,
    is_file,
    join_quoted,
    names_columns,
)
from pipelines.dataset.prepare.table_labels import Labels
from pipelines.dataset.prepare.table_paths import PathReader
from pipelines.dataset.prepare.text_lines import is_utf8, open_lines
from pipelines.dataset.prepare.video_extensions import EXTENSIONS
from pipelines.errors import DataError
from pipelines.formatting import format_count, printable

_SAMPLE = 200  # lines from which the format of the table is detected

_COMMENT = "lines that begin with # and name no video, skipped as comments"

_SEPARATOR_LINE = re.compile(r"(\ufeff)?sep=.\s*$", re.IGNORECASE)  # spreadsheets write it as the first line

_JSON = re.compile(r'\s*[\[{]\s*([\[{"].*)?$', re.DOTALL)

_HEADER_AGAIN = "lines that repeat the header, skipped"

_AFTER_NAME = re.compile(r"\.(\w+)\s+\S")


def read_table(
    table: Path,
    root: Path | None = None,
    class_names: Sequence[str] | None = None,
    *,
    columns: Columns = (None, None, None),
) -> Listing:
    """The videos of a table, in its order.

    Args:
        root: the folder that relative paths start from; by default the table's folder.
        class_names: the class names by label. By default, if all labels are indices, the numbers from 0 to
            the largest; otherwise all names that occur, sorted.
        columns: the columns with path, label and weight, if the header does not name them as usual.

    Raises:
        DataError: the table cannot be read, or a line is invalid; the message has the file and the line.
    """
    findings = Findings()
    reader = _Reader(table, table.parent if root is None else root, columns, findings)
    try:
        reader.read()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{printable(table)}: cannot be read as a table of videos: {reason}") from error
    if not reader.paths:
        raise DataError(f"{printable(table)}: has no video; write a line with path and label for each")
    names, indices = reader.labels.resolve(class_names)
    labels = array("l", np.asarray(indices, np.int64)[reader.numbers].tobytes())
    if root is None:
        _note_other_root(table, reader.paths[:20], findings)
    return Listing(reader.paths, labels, names, reader.checked_weights(), reader.lines, findings)


class _Reader:
    """Reads a table line by line."""

    def __init__(self, table: Path, root: Path, columns: Columns, findings: Findings) -> None:
        self._table = table
        self._name = printable(table)
        self._root = root
        self._folder = str(root)
        self._columns = columns
        self._findings = findings
        self._path_reader = PathReader(root, findings)
        self._splits: Counter[str] = Counter()
        self.paths: list[str] = []
        self.labels = Labels(table, findings)
        self.numbers = array("l")
        """For each video, the number of its label in `labels`."""
        self.lines = array("l")
        self._weights: array[float] | None = None

    def read(self) -> None:
        with open_lines(self._table) as lines:
            sample = self._sample(lines)
        if not sample:
            return
        if _JSON.match(sample[0][1]):
            raise DataError(
                f"{self._name}: cannot be read as a table of videos: it looks like JSON; give lines of "
                "path,label"
            )
        form = detect_format(self._table, sample, self._root, self._columns, self._findings)
        self._weights = array("d") if form.weight is not None else None
        with open_lines(self._table) as lines:
            for number, row in self._rows(lines, form):
                if number != form.header_line and any(cell.strip() for cell in row):
                    self._take(number, row, form)
        if form.split is not None and len(self._splits) > 1:
            counts = ", ".join(f"{printable(value)} {count}" for value, count in self._splits.most_common(8))
            self._findings.note(
                f"The column with the split is ignored, so the manifest has the videos of all: {counts}. "
                "For one manifest per split, write a table of each."
            )

    def checked_weights(self) -> array[float] | None:
        if self._weights is not None and not any(self._weights):
            raise DataError(
                f"{self._name}: all weights are 0, so no video can be drawn; give some a weight above 0"
            )
        return self._weights

    def _sample(self, lines: Iterator[str]) -> list[tuple[int, str]]:
        """The first lines with their numbers, without blank lines and comments."""
        sample: list[tuple[int, str]] = []
        comments: list[tuple[int, str]] = []
        for number, line in enumerate(islice(lines, 20 * _SAMPLE), start=1):
            self._check_text(number, line)
            if not line.strip(" \t\r\n,;|") or (number == 1 and _SEPARATOR_LINE.match(line)):
                continue
            if not line.startswith("#") or (not sample and names_columns(line)):
                sample.append((number, line.lstrip("# \t") if names_columns(line) else line))
            else:
                comments.append((number, line))
            if len(sample) == _SAMPLE:
                break
        return join_quoted(sample or comments)

    def _check_text(self, number: int, line: str) -> None:
        if "\0" in line:
            raise DataError(
                f"{self._name}: cannot be read as a table of videos: line {number} has a NUL character; "
                "is it a text file?"
            )

    def _rows(self, lines: Iterator[str], form: TableFormat) -> Iterator[tuple[int, list[str]]]:
        kept = self._without_comments(lines, form)
        if form.separator is not None:
            yield from csv_rows(kept, form.separator)
            return
        for number, line in enumerate(kept, start=1):
            yield number, form.split_line(line.strip())

    def _without_comments(self, lines: Iterator[str], form: TableFormat) -> Iterator[str]:
        """The lines, with comments replaced by empty lines, which keeps the line numbers."""
        for number, line in enumerate(lines, start=1):
            self._check_text(number, line)
            if number == 1 and _SEPARATOR_LINE.match(line):
                line = "\n"
            if line.startswith("#") and number != form.header_line:
                row = form.split_line(line.strip())
                if len(row) != form.fields or not is_file(self._root, row[form.path]):
                    self._findings.add(_COMMENT, f"{printable(self._table.name)}, line {number}")
                    line = "\n"
            yield line

    def _take(self, number: int, row: list[str], form: TableFormat) -> None:
        place = f"{self._name}, line {number}"
        raw, row = row, [cell.strip() for cell in row]
        while len(row) > form.fields and not row[-1]:
            row.pop()
        if len(row) != form.fields or not all(row[column] for column in form.used.values()):
            raise DataError(self._wrong_fields(place, row, form))
        if row == form.header:
            self._findings.add(_HEADER_AGAIN, place)
            return
        path, label = row[form.path], row[form.label]
        if raw[form.path] != path and is_file(self._root, raw[form.path]):
            path = raw[form.path]  # the name begins or ends with a blank
        path = self._path_reader.read(path, place)
        if form.separator is None and self._is_cut(path):
            raise DataError(
                f"{place}: there is no file '{printable(path)}'. If blanks separate the fields, the label is "
                "the last word; separate a label that contains blanks with a tab or a comma"
            )
        if not is_utf8(label):
            raise DataError(f"{place}: label '{printable(label)}' is not UTF-8; save the table as UTF-8")
        self.paths.append(os.path.join(self._folder, path))
        self.numbers.append(self.labels.number(label, number))
        self.lines.append(number)
        if form.split is not None and (len(self._splits) < 100 or row[form.split] in self._splits):
            self._splits[row[form.split]] += 1
        if self._weights is not None and form.weight is not None:
            self._weights.append(_weight(row[form.weight], place))

    def _wrong_fields(self, place: str, row: list[str], form: TableFormat) -> str:
        """The message for a line with the wrong number of fields, or with an empty one."""
        parts = list(form.used)
        expected = ", ".join(parts[:-1]) + f" and {parts[-1]}"
        if form.fields > len(parts):
            expected = f"{form.fields} fields as in the first line, with {expected}"
        text = f"{place}: expected {expected}, found {format_count(len(row), 'field')}."
        if len(row) == form.fields:
            empty = [name for name, column in form.used.items() if not row[column]]
            return f"{text[:-1]}, without {' and '.join(empty)}."
        if len(row) > form.fields:
            text += " Put a path that contains a comma in double quotes."
            text += " A video has one label; several labels are not supported."
            text += " A column of weights needs the header path,label,weight." if form.weight is None else ""
        return text

    def _is_cut(self, path: str) -> bool:
        """Whether the path seems to end with part of a label that contains blanks."""
        found = _AFTER_NAME.search(path)
        return found is not None and f".{found[1].lower()}" in EXTENSIONS and not is_file(self._root, path)


def _weight(text: str, place: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(f"{place}: weight '{printable(text)}'; a weight must be a number, 0 or more")
    return weight


def _note_other_root(table: Path, paths: Sequence[str], findings: Findings) -> None:
    """Note if the paths are relative to the current folder instead of the table's."""
    here, folder = Path.cwd(), table.parent.absolute()
    if here == folder or any(Path(path).exists() for path in paths):
        return
    inside = [Path(path).absolute() for path in paths]
    if any((here / path.relative_to(folder)).is_file() for path in inside if path.is_relative_to(folder)):
        findings.note(
            f"The first files are not in the table's folder, {printable(folder)}, which relative paths start "
            "from, but in the current folder. To start from the current folder, give --root ."
        )
