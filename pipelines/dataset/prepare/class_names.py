"""Class names: how they are normalised and compared, and the file that lists them."""

import csv
import difflib
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.text_lines import is_utf8, open_lines
from pipelines.errors import DataError
from pipelines.formatting import printable

_INDEX_FIRST = re.compile(r"(\d+)\s*[\s,;\t]\s*(\S.*)")
_INDEX_LAST = re.compile(r"(.*\S)\s*[,;\t]\s*(\d+)")
_HEADER = re.compile(r"[\w -]+[,;\t][\w -]+")


class ClassNames(tuple[str, ...]):
    """Class names by label, as a file lists them."""

    first = 0
    """The number of the first class in the file. Numeric labels of a table are counted from it."""
    note = ""
    """How the file was interpreted, if its lines are not just names."""


def class_name(text: str) -> str:
    r"""A class name as a manifest stores it: composed (NFC), valid UTF-8, without blanks at the ends.

    `é` is one character or two, depending on file system and editor. A byte that is not UTF-8 becomes `\xe9`.
    """
    name = os.fsencode(text).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", name.strip() or name)


def printable_class(name: str) -> str:
    r"""A class name for messages. A backslash is not doubled: `class_name` has escaped bytes as `\xe9`."""
    return printable(name).replace("\\\\", "\\")


def unknown_class(name: str, class_names: Sequence[str]) -> str:
    """Part of a message about an unknown class name, with the most similar class name."""
    near = difflib.get_close_matches(name, class_names, n=1)
    hint = f"did you mean '{printable_class(near[0])}'?" if near else f"there are {len(class_names)} others"
    return f"class '{printable_class(name)}' is not among the class names; {hint}"


def check_class_names(class_names: Sequence[str], findings: Findings) -> ClassNames:
    """Normalise class names that the user gives, and add what is unusual about them to the findings.

    Raises:
        DataError: a class name occurs twice.
    """
    names = ClassNames(map(class_name, class_names))
    if isinstance(class_names, ClassNames):
        names.first = class_names.first
        findings.note(class_names.note)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"class '{printable_class(name)}' occurs twice in the class names; remove one")
        seen.add(name)
    add_similar_names(names, findings)
    return names


def add_similar_names(names: Sequence[str], findings: Findings) -> None:
    """Add classes whose names differ only in case or blanks to the findings."""
    by_form: dict[str, str] = {}
    for name in names:
        form = "".join(name.casefold().split())
        if form in by_form:
            pair = f"'{printable_class(by_form[form])}' and '{printable_class(name)}'"
            findings.add("classes whose names differ only in case or blanks", pair)
        by_form.setdefault(form, name)


def read_class_names(path: str | Path) -> ClassNames:
    """The class names of a text file with one name per line, in the order of their labels.

    A column before or after the names may hold their indices, from 0 or from 1, which then give the order.
    Blank lines at the end are ignored.

    Raises:
        DataError: the file cannot be read; it has no name, a name twice, or a name that is not UTF-8.
    """
    path = Path(path)
    lines = _lines(path)
    if not lines:
        raise DataError(f"{printable(path)}: has no class name; write one per line")
    first, lines, note = _order_by_index(path, lines)
    seen: dict[str, int] = {}
    for number, line in lines:
        name = class_name(_unquoted(line))
        if name in seen:
            raise DataError(
                f"{printable(path)}, line {number}: class '{printable_class(name)}' is already in line "
                f"{seen[name]}"
            )
        seen[name] = number
    names = ClassNames(seen)
    names.first, names.note = first, note
    return names


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number and stripped text of each line, without blank lines at the end of the file."""
    try:
        with open_lines(path) as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, start=1)]
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"{printable(path)}: cannot be read as a list of class names: {reason}") from error
    while lines and not lines[-1][1]:
        lines.pop()
    for number, line in lines:
        if not line:
            raise DataError(f"{printable(path)}, line {number}: no class name; remove the blank line")
        if "\0" in line:
            raise DataError(f"{printable(path)}, line {number}: has a NUL character; is it a text file?")
        if not is_utf8(line):
            raise DataError(
                f"{printable(path)}, line {number}: '{printable(line)}' is not UTF-8; save the file as UTF-8"
            )
    return lines


def _order_by_index(path: Path, lines: list[tuple[int, str]]) -> tuple[int, list[tuple[int, str]], str]:
    """If each line has an index: the first index, the names ordered by index, and a note; otherwise
    `lines`."""
    patterns: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[int, str]]], ...] = (
        (_INDEX_FIRST, lambda found: (int(found[1][:9]), found[2])),
        (_INDEX_LAST, lambda found: (int(found[2][:9]), found[1])),
    )
    headers = (0, 1) if len(lines) > 1 and _HEADER.fullmatch(lines[0][1]) else (0,)
    for header in headers:
        for pattern, parts in patterns:
            found = [pattern.fullmatch(line) for _, line in lines[header:]]
            if not all(found):
                continue
            rows = sorted(
                (*parts(match), number)
                for match, (number, _) in zip(found, lines[header:], strict=True)
                if match
            )
            first = rows[0][0]
            if first > 1 or [index for index, _, _ in rows] != list(range(first, first + len(rows))):
                continue
            note = (
                f"{printable(path)}: the numbers from {first} give the order of the classes"
                + (f"; line 1 ('{printable(lines[0][1])}') is a header." if header else ".")
                + (" Numeric labels are counted from 1: 1 is the first class." if first else "")
            )
            return first, [(number, name) for _, name, number in rows], note
    return 0, lines, ""


def _unquoted(name: str) -> str:
    if len(name) > 1 and name[0] == name[-1] == '"':
        return next(csv.reader([name]))[0] if name.count('"') % 2 == 0 else name
    return name
