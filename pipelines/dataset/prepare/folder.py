"""Reads the videos of a folder with one folder per class: `ROOT/CLASS/**/VIDEO`."""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.dataset.prepare.class_names import (
    add_similar_names,
    check_class_names,
    class_name,
    printable_class,
    unknown_class,
)
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.video_extensions import EXTENSIONS, STILL_IMAGES, extension, is_system_folder
from pipelines.errors import DataError
from pipelines.formatting import format_count, printable

_SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"}
)

_NAMED_EXTENSIONS = 12  # unknown extensions with their own kind of finding; all others share one
_MAX_COUNTED = 1000  # unknown extensions with their own count, so that memory is bounded
_MANY = 10  # classes from which a note is given if each has only one video

# Kinds of findings; the summary appends the count.
_HIDDEN = "hidden files, skipped"
_SYSTEM = "hidden folders and system folders, skipped"
_DANGLING = "broken links, skipped"
_REVISITED = "links to a parent folder or to a folder that is already included, not followed"
_UNREADABLE = "folders and files that could not be read"
_SPECIAL = "special files such as pipes, skipped"
_AT_ROOT = "videos outside the class folders, skipped: they have no class"
_ONE_CLASS = "folders with the same class name (in Unicode NFC, without blanks at the ends)"
_NOT_UTF8 = "class names that are not UTF-8; such a byte is written as \\xNN"
_EMPTY = "class folders without a video, which keep their class number"
_UNKNOWN = "folders without a video that are not in the class names; they get no class number"


@dataclass(slots=True)
class _Class:
    """A class folder and its videos."""

    folder: str
    name: str
    videos: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    """Names of its direct subfolders that have videos."""
    direct: bool = False
    """Whether it has videos outside subfolders."""


def read_folder(
    root: Path,
    class_names: Sequence[str] | None = None,
    *,
    more_extensions: Collection[str] = (),
) -> Listing:
    """The videos under `root`, sorted by class and path.

    A file is a video if its extension is in `EXTENSIONS`, in upper or lower case. Links are followed; a
    folder that is reached twice within a class is read once. The listing's findings have what was skipped.

    Args:
        class_names: the class names by label, such as those of another split; by default the sorted names of
            the folders.
        more_extensions: further extensions of videos, such as `.dat`.

    Raises:
        DataError: `root` is not a folder, no folder in it has a video, a folder with videos is not in
            `class_names`, or all folders are named `train`, `val` and the like.
    """
    findings = Findings()
    if not root.is_dir():
        raise DataError(f"{printable(root)}: no such folder")
    walk = _Walk(root, EXTENSIONS | {extension(f"x.{e.lstrip('.')}") for e in more_extensions}, findings)
    classes = [_Class(folder, class_name(os.path.basename(folder))) for folder in walk.class_folders()]
    for found in classes:
        walk.add_videos(found)
    walk.add_extensions()
    if not any(found.videos for found in classes):
        raise DataError(_no_video(root, walk))
    _check_level(root, classes, given=class_names is not None)
    names = _class_names(classes, class_names, findings)
    _note_structure(root, classes, findings)
    labels = {name: label for label, name in enumerate(names)}
    paths: list[str] = []
    numbers = array("l")
    # Sorted by parts, so that the folder `a b` comes after `a` and everything in `a`.
    for found in sorted(classes, key=lambda found: found.folder.split("/")):
        paths += sorted(found.videos, key=lambda path: path.split("/"))
        numbers.extend([labels[found.name]] * len(found.videos) if found.videos else [])
    return Listing(paths, numbers, names, findings=findings)


class _Walk:
    """Walks the folders, and adds what it skips to the findings."""

    def __init__(self, root: Path, extensions: Collection[str], findings: Findings) -> None:
        self.root = str(root)
        self.at_root = 0
        self._extensions = extensions
        self._findings = findings
        self._unknown: dict[str, tuple[int, str]] = {}
        """By extension that is not a video's: the number of files, and the first of them."""
        # A link to the root or a parent of it would add the videos of all classes to one.
        self._above = {_identity(path) for path in (root.resolve(), *root.resolve().parents)}

    def class_folders(self) -> list[str]:
        """The folders directly in the root."""
        folders = []
        others: dict[str, list[str]] = {}
        for entry in self._entries(self.root):
            if self._is_folder(entry):
                if self._may_enter(entry.path, entry.name, set()):
                    folders.append(entry.path)
            elif self._is_video(entry, others):
                self._findings.add(_AT_ROOT, Path(entry.path))
                self.at_root += 1
        self._count_others(self.root, others)
        return folders

    def add_videos(self, found: _Class) -> None:
        """Collect the videos of a class: first those in real subfolders, then those behind links."""
        visited = self._above | {_identity(Path(found.folder))}
        folders: list[tuple[str, str]] = []
        links: deque[tuple[str, str]] = deque()
        here: tuple[str, str] | None = (found.folder, "")
        while here is not None:
            folder, part = here
            inside = self._read_folder(found, folder, part)
            links.extend((path, name) for path, name, is_link in inside if is_link)
            folders.extend((path, name) for path, name, is_link in reversed(inside) if not is_link)
            here = None
            # A folder that can be reached with and without a link is read without.
            while here is None and (folders or links):
                path, name = folders.pop() if folders else links.popleft()
                if self._may_enter(path, os.path.basename(path), visited):
                    visited.add(_identity(Path(path)))
                    here = (path, name)

    def _read_folder(self, found: _Class, folder: str, part: str) -> list[tuple[str, str, bool]]:
        """Collect the videos of one folder. Returns its subfolders: path, part of the class, whether a
        link."""
        inside = []
        others: dict[str, list[str]] = {}
        for entry in self._entries(folder):
            if self._is_folder(entry):
                inside.append((entry.path, part or entry.name, entry.is_symlink()))
            elif self._is_video(entry, others):
                found.videos.append(entry.path)
                found.direct |= not part
                if part:
                    found.parts.add(part)
        self._count_others(folder, others)
        return inside

    def _count_others(self, folder: str, others: dict[str, list[str]]) -> None:
        for ending, names in others.items():
            one = f"{folder}/{names[0]}"
            if len(names) == 1:
                self._findings.line(Path(one), "skipped: not the extension of a video")
            else:
                self._findings.line(Path(folder), f"skipped: {len(names)} files {printable(ending)}")
            if ending not in self._unknown and len(self._unknown) >= _MAX_COUNTED:
                ending = "of further extensions"
            count, first = self._unknown.get(ending, (0, one))
            self._unknown[ending] = (count + len(names), first)

    def add_extensions(self) -> None:
        """Add the files that are not videos to the findings, by extension."""
        ranked = sorted(self._unknown.items(), key=lambda item: (-item[1][0], item[0]))
        for place, (ending, (count, first)) in enumerate(ranked):
            if ending in STILL_IMAGES:
                kind = "still images, skipped"
            elif place < _NAMED_EXTENSIONS:
                kind = f"files {printable(ending)}, skipped"
            else:
                kind = "files of other extensions, skipped"
            self._findings.count(kind, Path(first), count)

    def other_extensions(self) -> list[str]:
        """Extensions of files that are not videos, the most frequent first."""
        return sorted(self._unknown, key=lambda ending: -self._unknown[ending][0])

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._findings.add(_UNREADABLE, Path(folder), detail=f"could not be read: {error.strerror}")
            return []

    def _is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    def _may_enter(self, path: str, name: str, visited: set[tuple[int, int]]) -> bool:
        if is_system_folder(name):
            self._findings.add(_SYSTEM, Path(path))
            return False
        try:
            identity = _identity(Path(path))
        except OSError as error:
            self._findings.add(_UNREADABLE, Path(path), detail=f"could not be read: {error.strerror}")
            return False
        if identity in visited or (os.path.islink(path) and identity in self._above):
            self._findings.add(_REVISITED, Path(path))
            return False
        return True

    def _is_video(self, entry: os.DirEntry[str], others: dict[str, list[str]]) -> bool:
        """Whether an entry that is not a folder is a video. Adds other files to `others`, by extension."""
        if entry.name.startswith("."):
            self._findings.add(_HIDDEN, Path(entry.path))
            return False
        try:
            is_file = entry.is_file()
        except OSError:
            is_file = False
        if not is_file:
            self._findings.add(_DANGLING if entry.is_symlink() else _SPECIAL, Path(entry.path))
            return False
        ending = extension(entry.name)
        if ending in self._extensions:
            return True
        others.setdefault(ending, []).append(entry.name)
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _class_names(
    classes: list[_Class], class_names: Sequence[str] | None, findings: Findings
) -> tuple[str, ...]:
    """The class names by label. Adds what is unusual about the folders to the findings."""
    by_name: dict[str, _Class] = {}
    for found in classes:
        if found.name in by_name:
            pair = f"{printable(by_name[found.name].folder)}\n  = {printable(found.folder)}"
            findings.count(_ONE_CLASS, pair)
            findings.line(Path(found.folder), f"the same class as {printable(by_name[found.name].folder)}")
        by_name.setdefault(found.name, found)
        if "\\x" in found.name and any("\udc80" <= c <= "\udcff" for c in found.folder):
            findings.add(_NOT_UTF8, printable_class(found.name))
    if class_names is None:
        names = tuple(sorted(by_name))
        add_similar_names(names, findings)
    else:
        names = check_class_names(class_names, findings)
        known = set(names)
        unknown = [found for found in classes if found.name not in known]
        for found in unknown:
            if not found.videos:
                findings.add(_UNKNOWN, Path(found.folder))
        wrong = [found for found in unknown if found.videos]
        if wrong:
            more = f", and {len(wrong) - 1} more such folders" if len(wrong) > 1 else ""
            raise DataError(f"{printable(wrong[0].folder)}: {unknown_class(wrong[0].name, names)}{more}")
    filled = {found.name for found in classes if found.videos}
    for found in classes:
        if found.name not in filled and found.name in names:
            findings.add(_EMPTY, Path(found.folder))
    return names


def _check_level(root: Path, classes: list[_Class], *, given: bool) -> None:
    """Raise DataError if the folders in the root are splits, unless the user gave them as class names."""
    filled = [found for found in classes if found.videos]
    if given or not all(found.name.lower() in _SPLITS and not found.direct for found in filled):
        return
    commands = "".join(
        f"\n  uniformerv2 prepare folder {printable(found.folder)} --out {printable(found.name)}.arrow"
        for found in filled
    )
    raise DataError(
        f"{printable(root)}: its folders {', '.join(found.name for found in filled)} seem to be splits that "
        f"contain the class folders: this is one level too high. Make a manifest of each:{commands}\n"
        "If they are classes, write their names to a file and give it with --classes."
    )


def _note_structure(root: Path, classes: list[_Class], findings: Findings) -> None:
    """Note if the root may be a level too high or too deep."""
    filled = [found for found in classes if found.videos]
    deeper = [found for found in filled if not found.direct]
    split = [found for found in deeper if {part.lower() for part in found.parts} <= _SPLITS]
    if split:
        parts = sorted({part for found in split for part in found.parts})
        findings.note(
            f"{len(split)} class folders have only the folders {', '.join(map(printable, parts))}. "
            "The manifest has the videos of all of them. For one manifest per split, write a table of each."
        )
    elif len(deeper) == len(filled) and any(len(found.parts) > 1 for found in deeper):
        first = min((found for found in deeper if len(found.parts) > 1), key=lambda found: found.folder)
        findings.note(
            f"All videos are a level deeper, as in {printable(first.folder)}/{printable(min(first.parts))}; "
            f"their class is the first folder. If it should be the second, give {printable(first.folder)}."
        )
    if len(filled) == 1:
        findings.note(
            f"Only one class has videos: is {printable(root)} the folder that contains the class folders?"
        )
    elif len(filled) >= _MANY and all(len(found.videos) == 1 for found in filled):
        findings.note(
            f"Each class has only one video: is {printable(root)} a level too deep, or are these not classes?"
        )


def _no_video(root: Path, walk: _Walk) -> str:
    """The message for a folder without a video in a class folder."""
    name = printable(root)
    text = f"{name}: has no video; expected {name}/CLASS/VIDEO, such as {name}/jump/001.mp4."
    if walk.at_root:
        text += (
            f" {format_count(walk.at_root, 'video')} outside a class folder: if this is the folder of one "
            f"class, give its parent, {printable(root.resolve().parent)}."
        )
    if extensions := walk.other_extensions():
        text += (
            f" It has files {', '.join(map(printable, extensions[:8]))}: if they are videos, give their "
            "extension with --extension."
        )
    return text
