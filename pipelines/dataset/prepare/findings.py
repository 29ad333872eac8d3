"""What the user should know about a data set: counts by kind with examples, notes, and a full list in a
file."""

import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipelines.atomic_file import atomic_file
from pipelines.formatting import printable, wrap

_NAMED = 3  # examples of each kind in a summary
_MAX_PRINTED = 10  # kinds in a summary, the most frequent; the list has the items of all kinds
_MAX_KINDS = 200  # kinds with their own count; all others share one
_IN_MEMORY = 2**20  # bytes of the list kept in memory; a longer list is in a temporary file


_NUMBER = re.compile(r"(?<![\w(])\d+(\.\d+)?")


def without_numbers(reason: str) -> str:
    """`lacks frame N` of `lacks frame 3`: equal for reasons that differ in numbers only."""
    return _NUMBER.sub("N", reason)


def format_reasons(first: str, differ: bool) -> str:
    """The first of some reasons that are equal without their numbers. differ: whether the numbers do."""
    return f"{first} (numbers differ)" if differ else first


@dataclass(slots=True)
class _Kind:
    text: str
    """The kind, or the first reason of a group of them."""
    differ: bool = False
    """Whether another reason of the group has other numbers."""
    count: int = 0
    examples: list[str] = field(default_factory=list)
    unnamed: int = 0
    """Items that no example represents; an example may represent several."""


class Findings:
    """Items, such as files, counted by kind of finding, and notes about the whole data set.

    The list of items is in a temporary file, so memory does not grow with their number.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._kinds: dict[str, _Kind] = {}
        # Closed and deleted with the object.
        self._lines: IO[str] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            max_size=_IN_MEMORY, mode="w+", encoding="utf-8", newline="\n"
        )

    @property
    def total(self) -> int:
        """Sum of the counts of all kinds."""
        return sum(kind.count for kind in self._kinds.values())

    def kinds(self) -> list[str]:
        """The kinds in the order of their first items."""
        return list(self._kinds)

    def counted(self, kind: str) -> int:
        """The count of a kind."""
        return self._kinds[kind].count if kind in self._kinds else 0

    def note(self, sentence: str) -> None:
        """Add a sentence about the whole data set, once."""
        if sentence and sentence not in self.notes:
            self.notes.append(sentence)

    def add(self, kind: str, item: str | Path, detail: str = "") -> None:
        """Count an item and add it to the list.

        Args:
            kind: printable text; the summary appends the count to it.
            item: a file, or printable text that names another thing.
            detail: printable text about the item for the list; by default `kind`.
        """
        self.count(kind, item)
        self.line(item, detail or kind)

    def add_reason(self, reason: str, item: str | Path) -> None:
        """Add an item with a reason of its own. Reasons that differ in numbers only are counted as one kind,
        whose name is `without_numbers`; the summary has the first of them."""
        self._count(without_numbers(reason), item, 1, reason)
        self.line(item, reason)

    def count(self, kind: str, item: str | Path, count: int = 1) -> None:
        """Count `count` items without listing them; `item` is an example, of one or more lines."""
        self._count(kind, item, count, kind)

    def _count(self, kind: str, item: str | Path, count: int, text: str) -> None:
        if kind not in self._kinds and len(self._kinds) >= _MAX_KINDS:
            kind = text = "other"
        found = self._kinds.setdefault(kind, _Kind(text))
        found.differ |= text != found.text
        found.count += count
        named = len(found.examples) < _NAMED
        if named:
            found.examples.append(_text(item))
        found.unnamed += count - named

    def line(self, item: str | Path, detail: str) -> None:
        """Add an item to the list without counting it."""
        self._lines.write(f"{_text(item)}\t{detail}\n")

    def write_list(self, path: Path) -> Path:
        """Write the list to `path`, a line for each item: the item, a tab and the detail.

        Without items, an older file at `path` is deleted.
        """
        if not self._kinds:
            path.unlink(missing_ok=True)
            return path
        self._lines.seek(0)
        with atomic_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
            while block := self._lines.read(_IN_MEMORY):
                file.write(block)
        return path

    def table(self) -> list[str]:
        """The most frequent kinds, each with its count and examples, as lines for the summary."""
        lines = []
        ranked = sorted(self._kinds, key=lambda kind: -self._kinds[kind].count)
        printed = set(ranked[:_MAX_PRINTED])
        for found in (found for kind, found in self._kinds.items() if kind in printed):
            lines += wrap(f"{format_reasons(found.text, found.differ)}: {found.count}", "  ")
            lines += [f"    {line}" for item in found.examples for line in item.split("\n")]
            if found.unnamed:
                lines.append(f"    and {found.unnamed} more")
        rest = [self._kinds[kind].count for kind in ranked[_MAX_PRINTED:]]
        if rest:
            lines += wrap(f"of {len(rest)} more kinds: {sum(rest)}", "  ")
        return lines


def _text(item: str | Path) -> str:
    return printable(item) if isinstance(item, Path) else item
