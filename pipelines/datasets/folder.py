"""One folder per class: `ROOT/CLASS/**/VIDEO`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipelines import DataError
from pipelines.datasets.listing import Listing, unknown_class

EXTENSIONS = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)


def read_folder(root: Path, class_names: Sequence[str] | None = None) -> Listing:
    """The videos under `root`, sorted by class and path.

    Files count as videos by their extension (`EXTENSIONS`), in any case; other files and hidden ones are left
    out.

    Args:
        class_names: the classes in the order of their labels, for a split that shares them with another; by
            default the names of the folders, sorted.

    Raises:
        DataError: `root` is no folder, has no folder with a video, or one that is not among `class_names`.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    names = tuple(class_names) if class_names is not None else tuple(folder.name for folder in folders)
    labels = {name: label for label, name in enumerate(names)}
    videos = []
    for folder in folders:
        if folder.name not in labels:
            raise DataError(f"{folder}: {unknown_class(folder.name, names)}")
        videos += [(path, labels[folder.name]) for path in _videos_in(folder)]
    if not videos:
        raise DataError(f"{root}: holds no video; expected {root}/CLASS/VIDEO, such as {root}/jump/001.mp4")
    return Listing(videos, names)


def _videos_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
