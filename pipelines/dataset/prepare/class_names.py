"""The file with the names of the classes, in the order of their labels."""

from __future__ import annotations

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
    """The classes in the order of their labels, as a file numbers them."""

    first = 0
    """The number that the file gives the first class. Labels that are numbers mean those of the file."""

    def counted_from(self, first: int) -> ClassNames:
        self.first = first
        return self


def class_name(text: str) -> str:
    r"""How a manifest names a class: composed (NFC), without blanks at the ends, valid UTF-8.

    `é` may be one character or two, and file systems and editors differ in it. A byte that is not UTF-8 is
    shown as `\xe9`.
    """
    name = os.fsencode(text).decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", name.strip() or name)


def printable_class(name: str) -> str:
    r"""A class name for messages. A backslash stays one: `\xe9` stands in the name itself."""
    return printable(name).replace("\\\\", "\\")


def unknown_class(name: str, class_names: Sequence[str]) -> str:
    """Half a sentence about a name that is none of the classes, with the nearest that is."""
    near = difflib.get_close_matches(name, class_names, n=1)
    hint = f"did you mean '{printable_class(near[0])}'?" if near else f"there are {len(class_names)} others"
    return f"class '{printable_class(name)}' is not among the class names; {hint}"


def check_class_names(class_names: Sequence[str], findings: Findings) -> ClassNames:
    """The given class names as manifests name them; a name that is then given twice is refused.

    Raises:
        DataError: a class name is given twice.
    """
    names = ClassNames(class_name(name) for name in class_names)
    names.counted_from(getattr(class_names, "first", 0))
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise DataError(f"class '{printable_class(name)}' is given twice")
        seen.add(name)
    add_similar_names(names, findings)
    return names


def add_similar_names(names: Sequence[str], findings: Findings) -> None:
    """Note classes whose names differ only in upper and lower case, or in blanks."""
    by_form: dict[str, str] = {}
    for name in names:
        form = "".join(name.casefold().split())
        if form in by_form:
            pair = f"'{printable_class(by_form[form])}' and '{printable_class(name)}'"
            findings.add("classes whose names differ only in case or blanks", pair)
        by_form.setdefault(form, name)


def read_class_names(path: Path, findings: Findings | None = None) -> ClassNames:
    """The class names of a text file with one name a line, in the order of their labels.

    A second column may hold the indices, from 0 or from 1, before or after the names: they then give the
    order. Blank lines at the end are left out.

    Args:
        findings: is told how the file was read, where that is not as one name a line.

    Raises:
        DataError: there is no such file, or it holds no name, one twice, or one that is not UTF-8.
    """
    findings = Findings() if findings is None else findings
    lines = _lines(path)
    if not lines:
        raise DataError(f"{printable(path)}: holds no class name")
    first, read = _with_indices(path, lines, findings) or (0, lines)
    seen: dict[str, int] = {}
    for number, line in read:
        name = class_name(_unquoted(line))
        if name in seen:
            raise DataError(
                f"{printable(path)}, line {number}: class '{printable_class(name)}' already stands in "
                f"line {seen[name]}"
            )
        seen[name] = number
    return ClassNames(seen).counted_from(first)


def _lines(path: Path) -> list[tuple[int, str]]:
    """Number and content of each line, without blanks at the ends and blank lines at the end of the file."""
    try:
        with open_lines(path) as file:
            lines = [(number, line.strip()) for number, line in enumerate(file, start=1)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{printable(path)}: cannot be read as a list of class names: {error}") from error
    while lines and not lines[-1][1]:
        lines.pop()
    for number, line in lines:
        if not line:
            raise DataError(f"{printable(path)}, line {number}: no class name")
        if "\0" in line:
            raise DataError(f"{printable(path)}, line {number}: holds a NUL character; is it a text file?")
        if not is_utf8(line):
            raise DataError(
                f"{printable(path)}, line {number}: '{printable(line)}' is not UTF-8; save the file as UTF-8"
            )
    return lines


def _with_indices(
    path: Path, lines: list[tuple[int, str]], findings: Findings
) -> tuple[int, list[tuple[int, str]]] | None:
    """The first index, and the lines in the order of their indices, without these; None where not all have
    one."""
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
            pairs = [
                (*parts(match), number)
                for match, (number, _) in zip(found, lines[header:], strict=True)
                if match
            ]
            first = min(index for index, _, _ in pairs)
            if first > 1 or sorted(index for index, _, _ in pairs) != list(range(first, first + len(pairs))):
                continue
            findings.note(
                f"{printable(path)}: the numbers from {first} are read as the labels' order"
                + (f", line 1 ('{printable(lines[0][1])}') as a header." if header else ".")
                + (" Labels that are numbers mean these: 1 is the first class." if first else "")
            )
            return first, [(number, name) for _, name, number in sorted(pairs)]
    return None


def _unquoted(name: str) -> str:
    if len(name) > 1 and name[0] == name[-1] == '"':
        return next(csv.reader([name]))[0] if name.count('"') % 2 == 0 else name
    return name
