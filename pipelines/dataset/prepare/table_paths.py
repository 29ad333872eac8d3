"""Paths of a table as programs write them: with `\\` of Windows, `~`, quotes, `file://`."""

import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.table_format import is_file
from pipelines.errors import DataError
from pipelines.formatting import printable

_UNUSUAL = re.compile(r"^['~]|[\\$]|://|[^\x00-\x7f]")
"""Characters that may need interpretation; most tables have none."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

# Interpretations: to which paths each applies, what it changes, and its note.
_CHANGES: tuple[tuple[Callable[[str], bool], Callable[[str], str], str], ...] = (
    (
        lambda path: len(path) > 2 and path[0] == path[-1] == "'",
        lambda path: path[1:-1],
        "Single quotes around paths are removed.",
    ),
    (
        lambda path: path.lower().startswith("file://"),
        lambda path: unquote(path[7:].removeprefix("localhost"), errors="surrogateescape"),
        "Addresses that begin with file:// are read as paths.",
    ),
    (
        lambda path: "\\" in path,
        lambda path: path.replace("\\", "/"),
        "Backslashes in paths are read as /, as on Windows.",
    ),
    (
        lambda path: path.startswith("~") or "$" in path,
        lambda path: os.path.expandvars(os.path.expanduser(path)),
        "A ~ and variables such as $HOME in paths are expanded.",
    ),
)


class PathReader:
    """Converts the paths of a table to file names, and adds a note for each interpretation."""

    def __init__(self, root: Path, findings: Findings) -> None:
        self._root = root
        self._findings = findings
        self._composed = False
        self._used: dict[str, bool] = {}
        """By note: whether the interpretation is used, which its first path decides by not being a file."""

    def read(self, path: str, place: str) -> str:
        """The file name for a path of the table; `place` is its file and line for messages.

        Raises:
            DataError: the path is a URL.
        """
        if not _UNUSUAL.search(path):
            return path
        written = path
        for applies, change, note in _CHANGES:
            if not applies(path):
                continue
            if note not in self._used:
                self._used[note] = not is_file(self._root, path)
                if self._used[note]:
                    self._findings.note(f"{note} The first: '{printable(written)}'.")
            if self._used[note]:
                path = change(path)
        if not path.isascii() and not is_file(self._root, path):
            path = self._other_form(path)
        if _URL.match(path) and not is_file(self._root, path):
            raise DataError(f"{place}: '{printable(path)}' is a URL; download the video and give its file")
        return path

    def _other_form(self, path: str) -> str:
        """The path in Unicode NFC or NFD, if that is the name of a file."""
        for form in ("NFC", "NFD"):
            other = unicodedata.normalize(form, path)
            if other != path and is_file(self._root, other):
                if not self._composed:
                    self._findings.note(
                        "Accents in paths are composed (NFC), in file names decomposed (NFD), or vice versa; "
                        f"such paths are accepted. The first: '{printable(path)}'."
                    )
                self._composed = True
                return other
        return path
