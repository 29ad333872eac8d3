"""Lists the videos to predict: named files, and all videos and folders of JPEG frames under named folders."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from pipelines.dataset.prepare.video_extensions import EXTENSIONS, extension, is_system_folder
from pipelines.decode.jpeg_frames import list_frames
from pipelines.errors import VideoError
from pipelines.formatting import printable
from trainer.errors import RunError

_IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}

_log = logging.getLogger(__name__)


def list_videos(named: Iterable[Path]) -> list[Path]:
    """Named files with any extension, and all videos in and below named folders, sorted by path.

    A folder without videos whose JPEG files have consecutive numbers (`00001.jpg`, ...) is a video.

    Folders are searched like those of `prepare.py folder`; links to folders are not followed. A named still
    image is a video of one frame; a warning is logged. Raises RunError for a missing path, and for a folder
    that contains no video or cannot be read.
    """
    found: list[Path] = []
    for path in named:
        if path.is_dir():
            inside = _videos_in(path)
            if not inside:
                raise RunError(f"{printable(path)} contains no video, and neither do its subfolders")
            found += inside
        elif os.path.lexists(path):
            if path.suffix.lower() in _IMAGES:
                _log.warning("%s is a still image: it is used as a video of one frame", printable(path))
            found.append(path)
        else:
            raise RunError(f"{printable(path)} does not exist")
    return found


def _videos_in(root: Path) -> list[Path]:
    def unreadable(error: OSError) -> None:
        raise RunError(f"{printable(Path(error.filename))} cannot be read: {error.strerror}") from error

    found = []
    for folder, folders, files in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not is_system_folder(name)]
        videos = [name for name in files if extension(name) in EXTENSIONS and not name.startswith(".")]
        found += [Path(folder, name) for name in videos]
        if not videos and _holds_frames(Path(folder)):
            found.append(Path(folder))
    return sorted(found)


def _holds_frames(folder: Path) -> bool:
    try:
        return bool(list_frames(folder))
    except VideoError:
        return False
