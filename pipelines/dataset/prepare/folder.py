"""One folder per class: `ROOT/CLASS/**/VIDEO`."""

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
from pipelines.dataset.prepare.listing import Listing, Videos
from pipelines.dataset.prepare.video_extensions import EXTENSIONS, STILL_IMAGES, extension, is_system_folder
from pipelines.errors import DataError
from pipelines.formatting import printable

_SPLITS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "evaluation"}
)

_NAMED_EXTENSIONS = 12
"""Unknown extensions that a summary names; it counts the rest as one."""

_MOST_COUNTED = 1000
"""Unknown extensions that are counted apart, so that memory is bounded."""

_MANY = 10
"""Classes from which on it is worth a word that each has just one video."""

# Kinds of findings: a count follows.
_HIDDEN = "hidden files, not taken"
_SYSTEM = "hidden folders and folders of the system, not looked into"
_DANGLING = "links that lead nowhere"
_REVISITED = "links to folders above them, or to folders taken already; not followed"
_UNREADABLE = "folders and files that could not be read"
_SPECIAL = "neither files nor folders, not taken"
_AT_ROOT = "videos directly in the folder of the class folders, not taken: they have no class"
_ONE_CLASS = "folders of one class (names are equal after NFC and without blanks at the ends)"
_NOT_UTF8 = "class names that are not UTF-8; a byte is shown as \\xNN"
_EMPTY = "class folders without a video, which keep their class number"
_STRANGERS = "folders without a video that are not among the class names; they get no class number"


@dataclass(slots=True)
class _Class:
    """A class folder, and what was found in it."""

    folder: str
    name: str
    videos: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    """Names of the folders directly in it that hold videos."""
    direct: bool = False
    """Whether videos lie directly in it."""


def read_folder(
    root: Path,
    class_names: Sequence[str] | None = None,
    *,
    more_extensions: Collection[str] = (),
    findings: Findings | None = None,
) -> Listing:
    """The videos under `root`, sorted by class and path.

    Files count as videos by their extension (`EXTENSIONS`), in any case. Links are followed; a folder that is
    reached twice within a class is taken once. The listing's findings name what was left out.

    Args:
        class_names: the classes in the order of their labels, for a split that shares them with another; by
            default the names of the folders, sorted.
        more_extensions: further ones, such as `.dat`.

    Raises:
        DataError: `root` is no folder, has no folder with a video, or one that is not among `class_names`;
            or all its folders are called `train`, `val` and the like.
    """
    findings = Findings() if findings is None else findings
    if not root.is_dir():
        raise DataError(f"{printable(root)}: no such folder")
    walk = _Walk(root, EXTENSIONS | {extension(f"x.{e.lstrip('.')}") for e in more_extensions}, findings)
    classes = [_Class(folder, class_name(os.path.basename(folder))) for folder in walk.class_folders()]
    for found in classes:
        walk.fill(found)
    walk.say_extensions()
    if not any(found.videos for found in classes):
        raise DataError(_no_video(root, walk))
    _check_level(root, classes, given=class_names is not None)
    names = _names(root, classes, class_names, findings)
    _say_structure(root, classes, findings)
    labels = {name: label for label, name in enumerate(names)}
    videos = Videos()
    numbers = array("l")
    # Paths are compared by their parts, so that `a b` stands after `a`, with all that is in it.
    for found in sorted(classes, key=lambda found: found.folder.split("/")):
        videos.paths += sorted(found.videos, key=lambda path: path.split("/"))
        numbers.extend([labels[found.name]] * len(found.videos) if found.videos else [])
    videos.labels = numbers
    return Listing(videos, names, findings=findings)


class _Walk:
    """Goes through the folders, and counts what it leaves out."""

    def __init__(self, root: Path, extensions: Collection[str], findings: Findings) -> None:
        self.root = str(root)
        self.at_root = 0
        self._extensions = extensions
        self._findings = findings
        self._unknown: dict[str, tuple[int, str]] = {}
        """Of an extension that is not taken, how many files have it and the first."""
        # A link to the root or above it would give one class the videos of all.
        self._above = {_identity(path) for path in (root.resolve(), *root.resolve().parents)}

    def class_folders(self) -> list[str]:
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

    def fill(self, found: _Class) -> None:
        """Collect the videos of a class: first those that lie there, then those that links lead to."""
        visited = self._above | {_identity(Path(found.folder))}
        folders: list[tuple[str, str]] = []
        links: deque[tuple[str, str]] = deque()
        here: tuple[str, str] | None = (found.folder, "")
        while here is not None:
            folder, part = here
            inside = self._look_into(found, folder, part)
            links.extend((path, name) for path, name, is_link in inside if is_link)
            folders.extend((path, name) for path, name, is_link in reversed(inside) if not is_link)
            here = None
            # Of two ways to one folder, the one without a link is taken.
            while here is None and (folders or links):
                path, name = folders.pop() if folders else links.popleft()
                if self._may_enter(path, os.path.basename(path), visited):
                    visited.add(_identity(Path(path)))
                    here = (path, name)

    def _look_into(self, found: _Class, folder: str, part: str) -> list[tuple[str, str, bool]]:
        """Take the videos of one folder. Returns its folders: path, part of the class, whether a link."""
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
                self._findings.line(Path(one), "not taken: not the extension of a video")
            else:
                self._findings.line(Path(folder), f"not taken: {len(names)} files {printable(ending)}")
            if ending not in self._unknown and len(self._unknown) >= _MOST_COUNTED:
                ending = "of further extensions"
            count, first = self._unknown.get(ending, (0, one))
            self._unknown[ending] = (count + len(names), first)

    def say_extensions(self) -> None:
        """Add the files that are no videos to the findings: by extension, the most frequent apart."""
        ranked = sorted(self._unknown.items(), key=lambda item: (-item[1][0], item[0]))
        for place, (ending, (count, first)) in enumerate(ranked):
            if ending in STILL_IMAGES:
                kind = "still images, not taken"
            elif place < _NAMED_EXTENSIONS:
                kind = f"files {printable(ending)}, not taken"
            else:
                kind = "files of other extensions, not taken"
            self._findings.count(kind, Path(first), count)

    def endings(self) -> list[str]:
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
        """Whether the entry, which is no folder, is a video. Other files go to `others`, by extension."""
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


def _names(
    root: Path, classes: list[_Class], class_names: Sequence[str] | None, findings: Findings
) -> tuple[str, ...]:
    """The classes in the order of their labels; what is odd about the folders goes to the findings."""
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
        strangers = [found for found in classes if found.name not in known]
        for found in strangers:
            if not found.videos:
                findings.add(_STRANGERS, Path(found.folder))
        wrong = [found for found in strangers if found.videos]
        if wrong:
            more = f", and {len(wrong) - 1} more such folders" if len(wrong) > 1 else ""
            raise DataError(f"{printable(wrong[0].folder)}: {unknown_class(wrong[0].name, names)}{more}")
    filled = {found.name for found in classes if found.videos}
    for found in classes:
        if found.name not in filled and found.name in names:
            findings.add(_EMPTY, Path(found.folder))
    return names


def _check_level(root: Path, classes: list[_Class], *, given: bool) -> None:
    """Refuse a root whose folders are splits, unless the user named these as classes."""
    filled = [found for found in classes if found.videos]
    if given or not all(found.name.lower() in _SPLITS and not found.direct for found in filled):
        return
    commands = "".join(
        f"\n  uniformerv2 prepare folder {printable(found.folder)} --out {printable(found.name)}.arrow"
        for found in filled
    )
    raise DataError(
        f"{printable(root)}: its folders are called {', '.join(found.name for found in filled)} and hold the "
        f"class folders: this is one level too high. Make a manifest of each:{commands}\n"
        "If these are classes, name them in a file and give it with --classes."
    )


def _say_structure(root: Path, classes: list[_Class], findings: Findings) -> None:
    """Note where the root may be a level too high or too deep."""
    filled = [found for found in classes if found.videos]
    deeper = [found for found in filled if not found.direct]
    split = [found for found in deeper if {part.lower() for part in found.parts} <= _SPLITS]
    if split:
        parts = sorted({part for found in split for part in found.parts})
        findings.note(
            f"{len(split)} class folders hold only folders called {', '.join(map(printable, parts))}. "
            "The manifest has the videos of all of them; for one manifest each, list them in a table."
        )
    elif len(deeper) == len(filled) and any(len(found.parts) > 1 for found in deeper):
        first = min((found for found in deeper if len(found.parts) > 1), key=lambda found: found.folder)
        findings.note(
            f"All videos lie a level deeper, as in {printable(first.folder)}/{printable(min(first.parts))}: "
            f"the class is the first folder. If it is to be the second, give {printable(first.folder)}."
        )
    if len(filled) == 1:
        findings.note(
            f"There is one class with videos only: is {printable(root)} the folder of the class folders?"
        )
    elif len(filled) >= _MANY and all(len(found.videos) == 1 for found in filled):
        findings.note(
            f"Every class has one video only: is {printable(root)} a level too deep, or are these no classes?"
        )


def _no_video(root: Path, walk: _Walk) -> str:
    shown = printable(root)
    text = f"{shown}: holds no video; expected {shown}/CLASS/VIDEO, such as {shown}/jump/001.mp4."
    if walk.at_root:
        above = printable(root.resolve().parent)
        text += (
            f" {walk.at_root} video(s) lie directly in it: if it is the folder of one class, give the folder "
            f"above, {above}."
        )
    if endings := walk.endings():
        text += (
            f" Files there are {', '.join(map(printable, endings[:8]))}: if those are videos, say so with "
            f"--extension."
        )
    return text
