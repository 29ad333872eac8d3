"""Folders of JPEG frames under other folders, by the name that an annotation gives them."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path

from pipelines.dataset.manifest import SourceKind
from pipelines.dataset.prepare.annotations import MISSING, as_listing
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.video_extensions import holds, is_system_folder
from pipelines.dataset.prepare.video_index import REPEATED, sorted_entries
from pipelines.errors import DataError
from pipelines.formatting import printable

FRAME_RATE = 12.0
"""Frames per second of the videos of Something-Something, of which frames are published or extracted."""

_MOST_FRAME_RATE = 1000.0

NOT_ANNOTATED = "folders of frames that no row in use names"


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
            inside = sorted_entries(folder, self._findings)
            if any(entry.name.lower().endswith((".jpg", ".jpeg")) for entry in inside):
                self._findings.add(NOT_ANNOTATED, Path(folder))
            below = [
                entry
                for entry in inside
                if (holds(entry.is_dir) if entry.name in names else entry.is_dir(follow_symlinks=False))
            ]
            yield from (entry.path for entry in below if entry.name in names)
            folders += [
                entry.path
                for entry in reversed(below)
                if entry.name not in names and not is_system_folder(entry.name)
            ]


def check_frame_rate(fps: float) -> None:
    """Raises DataError for a rate that frames cannot have."""
    if not 0 < fps <= _MOST_FRAME_RATE:
        raise DataError(f"--fps {fps:g}: expected a number above 0, and at most {_MOST_FRAME_RATE:g}")


def list_frame_folders(
    annotations: Path,
    classes: Mapping[str, str],
    names: Sequence[str],
    frames: Sequence[Path],
    findings: Findings,
    *,
    fps: float,
) -> Listing:
    """The annotated videos that have a folder of frames.

    Args:
        annotations: their file, for messages.
        classes: the class of each video by its name, which is that of its folder.
        names: of the classes, by label.
        frames: folders to search, at any depth.
        fps: frames per second at which the frames were taken.

    Raises DataError if no video has a folder.
    """
    index = FrameFolderIndex(frames, classes.keys(), findings)
    found: list[tuple[Path, str]] = []
    for video, label in classes.items():
        path = index.find(video)
        if path is None:
            findings.add(MISSING, printable(video))
        else:
            found.append((path, label))
    if not found:
        raise DataError(
            f"{printable(annotations)}: none of its {len(classes)} videos has a folder of frames below "
            f"{', '.join(map(printable, frames))}; the first would be called {printable(next(iter(classes)))}"
        )
    findings.note(f"{len(found):,} of {len(classes):,} videos of the annotations have a folder of frames.")
    return as_listing(found, names, findings, source=SourceKind.FRAMES, fps=fps)
