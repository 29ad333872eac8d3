"""Video files under folders, by the name that an annotation gives them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.video_extensions import EXTENSIONS, extension, holds, is_system_folder
from pipelines.errors import DataError
from pipelines.formatting import printable

REPEATED = "videos found in several places; the first is used"
UNREADABLE = "folders that could not be read"
# A row that is left out, such as one of two with different labels, is not in use.
NOT_ANNOTATED = "video files that no row in use names"


class VideoFileIndex:
    """The video files below some folders by their stem: `abc_000001_000011` of `abc_000001_000011.mp4`.

    A million files take about 200 MB. Where several files have one stem, the first in the order of the
    folders and of the paths is used. Links to folders are not followed; those to files are.
    """

    def __init__(self, folders: Sequence[Path], findings: Findings) -> None:
        """Raises DataError for a folder that does not exist, or if none holds a video."""
        self._findings = findings
        self._paths: dict[str, str] = {}
        self._used: set[str] = set()
        for folder in folders:
            if not folder.is_dir():
                raise DataError(f"{printable(folder)}: no such folder")
            for path in find_videos(str(folder), findings):
                stem = os.path.splitext(os.path.basename(path))[0]
                first = self._paths.setdefault(stem, path)
                if first != path:
                    findings.add(REPEATED, Path(path), f"the same name as {printable(Path(first))}")
        if not self._paths:
            shown = ", ".join(printable(folder) for folder in folders)
            raise DataError(f"{shown}: no file with the extension of a video, such as .mp4, .mkv or .webm")

    def __len__(self) -> int:
        return len(self._paths)

    def find(self, stems: Iterable[str]) -> Path | None:
        """The file of the first of these stems that exists, or None."""
        for stem in stems:
            if (path := self._paths.get(stem)) is not None:
                self._used.add(stem)
                return Path(path)
        return None

    def stems(self) -> list[str]:
        """All stems, sorted."""
        return sorted(self._paths)

    def is_used(self, stem: str) -> bool:
        """Whether `find` returned the file of this stem."""
        return stem in self._used

    def report_unused(self) -> None:
        """Add the files that no call of `find` returned to the findings."""
        for stem in sorted(self._paths.keys() - self._used):
            self._findings.add(NOT_ANNOTATED, Path(self._paths[stem]))


def find_videos(root: str, findings: Findings) -> Iterator[str]:
    """The files below a folder with the extension of a video, sorted in each folder. Folders that cannot be
    read are added to the findings; links to folders are not followed."""
    folders = [root]
    while folders:
        folder = folders.pop()
        inside = sorted_entries(folder, findings)
        below = [entry.path for entry in inside if entry.is_dir(follow_symlinks=False)]
        folders += [path for path in reversed(below) if not is_system_folder(os.path.basename(path))]
        for entry in inside:
            hidden = entry.name.startswith(".")
            if not hidden and extension(entry.name) in EXTENSIONS and holds(entry.is_file):
                yield entry.path


def sorted_entries(folder: str, findings: Findings) -> list[os.DirEntry[str]]:
    """What a folder holds, by name; nothing and a finding where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        findings.add(UNREADABLE, Path(folder), f"could not be read: {error.strerror}")
        return []
