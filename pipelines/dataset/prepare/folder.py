"""Reads the videos of a folder with one folder per class: `ROOT/CLASS/**/VIDEO`."""

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
from pipelines.dataset.prepare.video_extensions import (
    EXTENSIONS,
    STILL_IMAGES,
    extension,
    holds,
    is_system_folder,
)
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
    root: Path, class_names: Sequence[str] | None = None, *, more_extensions: Collection[str] = ()
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
        folders, videos = self._scan(self.root)
        classes = [entry.path for entry in folders if self._may_enter(entry.path, set())]
        for path in videos:
            self._findings.add(_AT_ROOT, Path(path))
        self.at_root = len(videos)
        return classes

    def add_videos(self, found: _Class) -> None:
        """Collect the videos of a class: first those in real subfolders, then those behind links."""
        visited = self._above | {_identity(found.folder)}
        folders = [(found.folder, "")]  # with the name of the direct subfolder of the class
        links: deque[tuple[str, str]] = deque()
        while folders or links:
            # A folder that can be reached with and without a link is read without.
            folder, part = folders.pop() if folders else links.popleft()
            if folder != found.folder:
                if not self._may_enter(folder, visited):
                    continue
                visited.add(_identity(folder))
            inside, videos = self._scan(folder)
            links.extend((entry.path, part or entry.name) for entry in inside if entry.is_symlink())
            real = [(entry.path, part or entry.name) for entry in inside if not entry.is_symlink()]
            folders.extend(reversed(real))
            found.videos += videos
            found.direct |= bool(videos) and not part
            if videos and part:
                found.parts.add(part)

    def _scan(self, folder: str) -> tuple[list[os.DirEntry[str]], list[str]]:
        """The subfolders and the videos of a folder, by name. Adds its other files to the findings."""
        try:
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._findings.add(_UNREADABLE, Path(folder), detail=f"could not be read: {error.strerror}")
            return [], []
        folders: list[os.DirEntry[str]] = []
        videos: list[str] = []
        others: dict[str, list[str]] = {}
        for entry in inside:
            ending = extension(entry.name)
            if holds(entry.is_dir):
                folders.append(entry)
            elif entry.name.startswith("."):
                self._findings.add(_HIDDEN, Path(entry.path))
            elif not holds(entry.is_file):
                self._findings.add(_DANGLING if entry.is_symlink() else _SPECIAL, Path(entry.path))
            elif ending in self._extensions:
                videos.append(entry.path)
            else:
                others.setdefault(ending, []).append(entry.path)
        for ending, paths in others.items():
            if len(paths) == 1:
                self._findings.line(Path(paths[0]), "skipped: not the extension of a video")
            else:
                self._findings.line(Path(folder), f"skipped: {len(paths)} files {printable(ending)}")
            if ending not in self._unknown and len(self._unknown) >= _MAX_COUNTED:
                ending = "of further extensions"
            count, first = self._unknown.get(ending, (0, paths[0]))
            self._unknown[ending] = (count + len(paths), first)
        return folders, videos

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

    def _may_enter(self, path: str, visited: set[tuple[int, int]]) -> bool:
        if is_system_folder(os.path.basename(path)):
            self._findings.add(_SYSTEM, Path(path))
            return False
        try:
            identity = _identity(path)
        except OSError as error:
            self._findings.add(_UNREADABLE, Path(path), detail=f"could not be read: {error.strerror}")
            return False
        if identity in visited or (os.path.islink(path) and identity in self._above):
            self._findings.add(_REVISITED, Path(path))
            return False
        return True


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
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
