"""Which videos are meant: files as they are named, and all videos under a folder."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipelines.dataset.prepare.video_extensions import EXTENSIONS, extension, is_system_folder
from pipelines.formatting import printable
from trainer.errors import RunError


def list_videos(named: Iterable[Path]) -> list[Path]:
    """Files as named, whatever their extension; of a folder all videos in it and below, sorted by path.

    In folders, what counts as a video, and which folders are passed over, is as `prepare.py folder` has it;
    links to folders are not followed. Raises RunError for a name that leads nowhere, and for a folder that
    holds no video or cannot be read.
    """
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            inside = _videos_in(path)
            if not inside:
                raise RunError(f"{printable(path)} holds no video, nor does a folder in it")
            found += inside
        elif os.path.lexists(path):
            found.append(path)
        else:
            raise RunError(f"{printable(path)}: there is no such file or folder")
    return found


def _videos_in(root: Path) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise RunError(f"{printable(Path(error.filename))} cannot be read: {error.strerror}") from error

    found = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not is_system_folder(name)]
        found += [
            Path(folder, name) for name in files if extension(name) in EXTENSIONS and not name.startswith(".")
        ]
    return sorted(found)
