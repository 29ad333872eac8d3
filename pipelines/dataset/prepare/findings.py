"""What is said of a data set beside its rows: what was left out, and what its owner should know."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pipelines.atomic_file import atomic_file
from pipelines.formatting import printable, wrap

_NAMED = 3
"""Examples that a summary names of each kind."""

_SHOWN_KINDS = 10
"""Kinds that a summary shows, the most frequent; the list has the items of all."""

_MOST_KINDS = 200
"""Kinds that are counted apart; what comes later is counted as one."""

_IN_MEMORY = 2**20
"""Bytes of a list that are kept in memory; a longer one lies in a temporary file."""


@dataclass(slots=True)
class _Kind:
    count: int = 0
    first: list[str] = field(default_factory=list)
    unnamed: int = 0
    """Of `count`, those that `first` does not stand for."""


class Findings:
    """Items with what was found of each, counted by kind, and sentences about the whole.

    The items go to a file, so memory does not grow with their number.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._kinds: dict[str, _Kind] = {}
        # Closed with the object: a temporary file has no name and nobody else to close it.
        self._lines: IO[str] = tempfile.SpooledTemporaryFile(  # noqa: SIM115
            max_size=_IN_MEMORY, mode="w+", encoding="utf-8", newline="\n"
        )

    def __bool__(self) -> bool:
        return bool(self._kinds or self.notes)

    @property
    def listed(self) -> int:
        """Items of all kinds, each as often as it counts."""
        return sum(kind.count for kind in self._kinds.values())

    def kinds(self) -> list[str]:
        """The kinds that items were found of, in the order of the first of each."""
        return list(self._kinds)

    def counted(self, kind: str) -> int:
        """Items of a kind."""
        return self._kinds[kind].count if kind in self._kinds else 0

    def note(self, sentence: str) -> None:
        """Add a sentence about the whole."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def add(self, kind: str, item: str | Path, detail: str = "") -> None:
        """Count an item and list it.

        Args:
            kind: what items are counted by: printable words that a count follows.
            item: a file, or printable text that names something else.
            detail: what the list says of the item, printable; by default `kind`.
        """
        self.count(kind, item)
        self.line(item, detail or kind)

    def count(self, kind: str, item: str | Path, count: int = 1) -> None:
        """Count things that `item`, of one or more lines, is an example of, without listing it."""
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            kind = "other"
        found = self._kinds.setdefault(kind, _Kind())
        found.count += count
        named = len(found.first) < _NAMED
        if named:
            found.first.append(_shown(item))
        found.unnamed += count - named

    def line(self, item: str | Path, detail: str) -> None:
        """Write a line of the list."""
        self._lines.write(f"{_shown(item)}\t{detail}\n")

    def write_list(self, path: Path) -> Path:
        """Write the items to `path`, a line each: the item and, after a tab, what was found of it.

        Without items, a file that an earlier call left there is deleted.
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
        """Lines with each kind, its count and its first items; of many kinds, the most frequent."""
        lines = []
        ranked = sorted(self._kinds, key=lambda kind: -self._kinds[kind].count)
        shown = set(ranked[:_SHOWN_KINDS])
        for kind in (kind for kind in self._kinds if kind in shown):
            found = self._kinds[kind]
            lines += wrap(f"{kind}: {found.count}", "  ")
            lines += [f"    {line}" for item in found.first for line in item.split("\n")]
            if found.unnamed:
                lines.append(f"    and {found.unnamed} more")
        rest = [self._kinds[kind].count for kind in ranked[_SHOWN_KINDS:]]
        if rest:
            lines += wrap(f"of {len(rest)} more kinds: {sum(rest)}", "  ")
        return lines


def _shown(item: str | Path) -> str:
    return printable(item) if isinstance(item, Path) else item
