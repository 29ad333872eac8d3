"""File extensions of videos and images, and names of system folders."""

import os
from collections.abc import Callable

# Containers, then streams without one.
EXTENSIONS = frozenset(
    {
        ".3g2", ".3gp", ".3gp2", ".3gpp", ".amv", ".apng", ".asf", ".avi", ".bik", ".cdxl", ".dav", ".divx",
        ".dvr-ms", ".evo", ".f4p", ".f4v", ".flc", ".fli", ".flv", ".gif", ".gxf", ".ismv", ".ivf", ".ivr",
        ".kux", ".m2p", ".m2t", ".m2ts", ".m4p", ".m4s", ".m4v", ".mj2", ".mk3d", ".mkv", ".mod", ".moflex",
        ".mov", ".mp4", ".mp4v", ".mpe", ".mpeg", ".mpg", ".mqv", ".mts", ".mxf", ".mxg", ".nsv", ".nut",
        ".nuv", ".ogg", ".ogm", ".ogv", ".ogx", ".pmp", ".psp", ".qt", ".rec", ".rm", ".rmvb", ".roq", ".smk",
        ".svi", ".swf", ".tod", ".tp", ".trp", ".ts", ".ty", ".usm", ".viv", ".vob", ".vro", ".webm", ".wm",
        ".wmv", ".wtv", ".xesc", ".xmv", ".y4m", ".yop",
        ".264", ".265", ".266", ".avc", ".dif", ".dv", ".h261", ".h263", ".h264", ".h265", ".h266", ".h26l",
        ".hevc", ".m1v", ".m2v", ".mjpeg", ".mjpg", ".mp2v", ".mpv", ".mpv2", ".obu", ".vc1", ".vvc",
    }
)  # fmt: skip
"""Extensions of files that the FFmpeg of PyAV can decode as videos."""

STILL_IMAGES = frozenset(
    {
        ".avif", ".bmp", ".dng", ".exr", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jpe", ".jpeg", ".jpg",
        ".jxl", ".pgm", ".png", ".ppm", ".svg", ".tga", ".tif", ".tiff", ".webp",
    }
)  # fmt: skip
"""Extensions of images. PyAV does not decode animated `.webp` files."""

_SYSTEM_FOLDERS = frozenset(
    {
        "#recycle", "#snapshot", "$recycle.bin", "@__thumb", "@eadir", "@recently-snapshot", "@recycle",
        "@sharebin", "@tmp", "__macosx", "__pycache__", "found.000", "lost+found", "lost.dir", "recycled",
        "recycler", "system volume information",
    }
)  # fmt: skip


def extension(name: str) -> str:
    """The extension with its dot, in lower case; `without an extension` where there is none."""
    return os.path.splitext(name)[1].strip().lower() or "without an extension"


def is_system_folder(name: str) -> bool:
    """Whether a folder is hidden or made by an operating system or NAS: it is not a class and has no
    videos."""
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS


def holds(test: Callable[[], bool]) -> bool:
    """The result of a test of a directory entry; False for a link to itself."""
    try:
        return test()
    except OSError:
        return False
