"""Paths of a table as people's programs write them: Windows' separators, `~`, quotes, addresses."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.table_format import is_file
from pipelines.errors import DataError
from pipelines.formatting import printable

_UNUSUAL = re.compile(r"^['~]|[\\$]|://|[^\x00-\x7f]")
"""What may have to be read in another way; most tables have none of it."""

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(slots=True)
class _Change:
    """A way to read a path other than it is written, where the first such path is no file as written."""

    applies: Callable[[str], bool]
    change: Callable[[str], str]
    note: str
    used: bool | None = None
    """Whether it is used in this table; None while no path needed it."""


class PathReader:
    """Turns the path of a table's line into the name of a file."""

    def __init__(self, root: Path, findings: Findings) -> None:
        self._root = root
        self._findings = findings
        self._composed = False
        self._changes = [
            _Change(
                lambda path: len(path) > 2 and path[0] == path[-1] == "'",
                lambda path: path[1:-1],
                "Single quotes around paths are left out.",
            ),
            _Change(
                lambda path: path.lower().startswith("file://"),
                lambda path: unquote(path[7:].removeprefix("localhost"), errors="surrogateescape"),
                "Addresses that begin with file:// are read as paths.",
            ),
            _Change(
                lambda path: "\\" in path,
                lambda path: path.replace("\\", "/"),
                "Backslashes in paths are read as /, as Windows means them.",
            ),
            _Change(
                lambda path: path.startswith("~") or "$" in path,
                lambda path: os.path.expandvars(os.path.expanduser(path)),
                "A ~ and variables such as $HOME in paths are replaced by what they stand for.",
            ),
        ]

    def read(self, path: str, place: str) -> str:
        """The file that a path of the table means.

        Raises:
            DataError: it is the address of another machine; `place` is where it stands.
        """
        if not _UNUSUAL.search(path):
            return path
        written = path
        for change in self._changes:
            if not change.applies(path):
                continue
            if change.used is None:
                change.used = not is_file(self._root, path)
                if change.used:
                    self._findings.note(f"{change.note} The first: '{printable(written)}'.")
            if change.used:
                path = change.change(path)
        if not path.isascii() and not is_file(self._root, path):
            path = self._other_form(path)
        if _ADDRESS.match(path) and not is_file(self._root, path):
            raise DataError(f"{place}: '{printable(path)}' is an address; videos are read from files")
        return path

    def _other_form(self, path: str) -> str:
        """The path with accents composed or decomposed, where that names a file."""
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, path)
            if other != path and is_file(self._root, other):
                if not self._composed:
                    self._findings.note(
                        "Accents in paths are composed (NFC) or decomposed (NFD) otherwise than in the "
                        f"names of the files; they are taken for the same. The first: '{printable(path)}'."
                    )
                self._composed = True
                return other
        return path
