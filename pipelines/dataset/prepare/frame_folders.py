"""Folders of JPEG frames under other folders, by the name that an annotation gives them."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.video_extensions import is_system_folder
from pipelines.dataset.prepare.video_index import REPEATED, UNREADABLE
from pipelines.errors import DataError
from pipelines.formatting import printable

NOT_ANNOTATED = "folders of frames that no row of the annotations names"


class FrameFolderIndex:
    """The folders below some others whose names are annotated.

    An annotated folder is not opened: there are a hundred thousand of them, with millions of files. Where
    several have one name, the first in the order of the folders and of the paths is used.
    """

    def __init__(self, folders: Sequence[Path], names: Container[str], findings: Findings) -> None:
        """
        Args:
            names: of the annotated folders.

        Raises:
            DataError: a folder does not exist.
        """
        self._findings = findings
        self._paths: dict[str, str] = {}
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"{printable(folder)}: no such folder")
            for path in self._annotated(str(folder), names):
                name = os.path.basename(path)
                first = self._paths.setdefault(name, path)
                if first != path:
                    findings.add(REPEATED, Path(path), f"the same name as {printable(Path(first))}")

    def find(self, name: str) -> Path | None:
        """The folder of this name, or None."""
        path = self._paths.get(name)
        return None if path is None else Path(path)

    def _annotated(self, root: str, names: Container[str]) -> Iterator[str]:
        folders = [root]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(folder) as entries:
                    inside = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self._findings.add(UNREADABLE, Path(folder), f"could not be read: {error.strerror}")
                continue
            if any(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in inside):
                self._findings.add(NOT_ANNOTATED, Path(folder))
            below = [entry for entry in inside if entry.is_dir(follow_symlinks=entry.name in names)]
            yield from (entry.path for entry in below if entry.name in names)
            folders += [
                entry.path
                for entry in reversed(below)
                if entry.name not in names and not is_system_folder(entry.name)
            ]
