"""What a reader of an annotation format hands over, before anyone has looked into the videos."""

from __future__ import annotations

import difflib
import os
import unicodedata
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from pipelines.dataset.path_encoding import printable
from pipelines.dataset.prepare.findings import Findings
from pipelines.errors import DataError


class Videos(Sequence[tuple[Path, int]]):
    """Files with their labels, held as text and numbers: a million take about 150 MB, not a gigabyte."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.labels: Sequence[int] = array("l")

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Path, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Path, int] | list[tuple[Path, int]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return Path(self.paths[index]), int(self.labels[index])


@dataclass(frozen=True, slots=True)
class Listing:
    """Videos with their labels, in the order they will have in the manifest."""

    videos: Sequence[tuple[Path, int]]
    """Each video's file and its label, an index into the class names."""
    class_names: tuple[str, ...]
    weights: Sequence[float] | None = None
    """How often training draws each video, compared with the others; None is all equally often."""
    lines: Sequence[int] | None = None
    """The line of the table that each video stands in; None where there is no table."""
    findings: Findings = field(default_factory=Findings)
    """What the reader left out, and what it took in a way that its user should know."""


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
