"""The labels of a table, which are class names or indices, and the class of each."""

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.dataset.prepare.class_names import (
    ClassNames,
    add_similar_names,
    check_class_names,
    class_name,
    printable_class,
    unknown_class,
)
from pipelines.dataset.prepare.findings import Findings
from pipelines.errors import DataError
from pipelines.formatting import printable

# No data set has so many; a larger index is from a column that is not the label.
_MOST_CLASSES = 1_000_000

_INDEX = re.compile(r"(\d+)(\.0*)?", re.ASCII)
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)
_SEVERAL = re.compile(r"[\[({].*[,;|].*[\])}]|\d+(\s*[ ,;|]\s*\d+)+", re.ASCII)


class Labels:
    """The labels that occur in a table, each with its first line."""

    def __init__(self, table: Path, findings: Findings) -> None:
        self._table = printable(table)
        self._findings = findings
        self._numbers: dict[str, int] = {}
        self._lines: list[int] = []
        self._videos = 0

    def number(self, label: str, line: int) -> int:
        """A number for the label, by first occurrence; `resolve` maps it to a class when all labels are
        known."""
        self._videos += 1
        number = self._numbers.setdefault(label, len(self._lines))
        if number == len(self._lines):
            self._lines.append(line)
        return number

    def resolve(self, class_names: Sequence[str] | None) -> tuple[tuple[str, ...], list[int]]:
        """The class names, and for each number of `number` the index of its class.

        Raises:
            DataError: a label is not a class; the message has its first line.
        """
        if class_names is None:
            names = ClassNames(self._found())
            self._note_unusual(names)
        else:
            names = check_class_names(class_names, self._findings)
        by_name = {name: index for index, name in enumerate(names)}
        indices = []
        for label, line in zip(self._numbers, self._lines, strict=True):
            # Names before indices: a class may be named "7".
            index = by_name.get(class_name(label))
            indices.append(self._index(label, line, names) if index is None else index)
        if not names.first:
            self._note_base(indices, given=class_names is not None)
        return names, indices

    def _index(self, label: str, line: int, names: ClassNames) -> int:
        place = f"{self._table}, line {line}"
        index = _index_of(label)
        if index is None:
            if _NUMBER.fullmatch(label):
                raise DataError(f"{place}: label {label} is not a class; indices are whole numbers from 0")
            raise DataError(f"{place}: {unknown_class(label, names)}")
        last = len(names) - 1 + names.first
        if not names.first <= index <= last:
            what = "begin at 1" if index < names.first else f"end at {last}"
            base = " Labels are counted from 0." if index == len(names) and not names.first else ""
            raise DataError(f"{place}: label {label}, but labels {what}.{base}")
        return index - names.first

    def _found(self) -> tuple[str, ...]:
        """The class names that follow from the labels, if the user gives none."""
        labels = list(zip(self._numbers, self._lines, strict=True))
        if not all(_NUMBER.fullmatch(label) for label, _ in labels):
            self._check_kinds(labels)
            names = tuple(sorted({class_name(label) for label, _ in labels}))
            add_similar_names(names, self._findings)
            return names
        largest = 0
        for label, line in labels:
            index = _index_of(label)
            if index is None:
                why = "is negative" if label.startswith("-") else "is not a whole number"
                raise DataError(
                    f"{self._table}, line {line}: label {label} {why}; labels are indices from 0, or names"
                )
            if index >= _MOST_CLASSES:
                raise DataError(
                    f"{self._table}, line {line}: label {label} is more than {_MOST_CLASSES - 1}; is the "
                    "label in another column?"
                )
            largest = max(largest, index)
        if any("." in label for label, _ in labels):
            self._findings.note("Labels such as 2.0 are read as the index 2.")
        return tuple(str(index) for index in range(1 + largest))

    def _check_kinds(self, labels: list[tuple[str, int]]) -> None:
        """Raise DataError if indices and names are mixed, or a label contains several."""
        indices = _index_of(labels[0][0]) is not None
        for label, line in labels:
            place = f"{self._table}, line {line}"
            if _SEVERAL.fullmatch(label):
                raise DataError(
                    f"{place}: label '{printable(label)}' looks like several labels; a video has one"
                )
            if (_index_of(label) is not None) != indices:
                kinds = ("a name", "an index") if indices else ("an index", "a name")
                raise DataError(
                    f"{place}: label '{printable(label)}' is {kinds[0]}, but the first label is {kinds[1]}. "
                    "If numbers are class names, give all names with --classes"
                )

    def _note_unusual(self, names: tuple[str, ...]) -> None:
        if len(self._numbers) == self._videos and self._videos >= 10 and not names[0].isdigit():
            self._findings.note(
                f"Each of the {self._videos} videos has a different class: is the label in another column?"
            )
        known = set(names)
        for name in names:
            parts = [part.strip() for part in re.split("[,;|]", name)]
            if len(parts) > 1 and known.issuperset(parts):
                self._findings.add(
                    "labels that look like several, used as separate classes", printable_class(name)
                )

    def _note_base(self, indices: list[int], *, given: bool) -> None:
        """Note if numeric labels seem to be counted from 1."""
        numeric = all(_index_of(label) is not None for label in self._numbers)
        if numeric and min(indices) > 0 and len(set(indices)) > 1:
            first = min(indices)
            text = f"Labels begin at {first}, and no video has label 0. Labels are counted from 0."
            if given:
                text += " If they should be counted from 1, every video has the wrong class name."
            self._findings.note(text)


def _index_of(label: str) -> int | None:
    found = _INDEX.fullmatch(label)
    # A longer number is not an index, and its conversion would be slow.
    return int(found[1][:20]) if found else None
