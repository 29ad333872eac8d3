"""What a row of a manifest is, and which values make it a bad one."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pipelines.dataset.paths import decode_path
from pipelines.errors import VideoError

MOST_PIXELS = 2**16
"""Along a side of a frame: more than any codec of FFmpeg's allows."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One video: where its bytes are, what it shows, what its frames are like."""

    path: str
    """The file, as `encode_path` writes it; a relative path is relative to the manifest's folder."""
    offset: int
    """First byte of the video inside the file."""
    length: int
    """Number of bytes; with offset 0, a length of 0 means the whole file."""
    label: int
    """Index into the manifest's class names."""
    frames: int
    """Number of video frames, counted, not taken from the container's header."""
    fps: float
    """Average frames per second, in single precision once stored; 0 where the file does not say."""
    width: int
    """Pixels, as shown: a rotation that the file asks for is applied."""
    height: int
    """Pixels, as shown: a rotation that the file asks for is applied."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ..."""
    weight: float = 1.0
    """How often training draws it, compared with the others; 1 in a manifest without weights."""


def check_row(row: ManifestRow, classes: int) -> None:
    """Check that the row's values can be those of a video.

    Args:
        classes: how many the manifest has.

    Raises:
        VideoError: one cannot; the reason follows the file's name in a sentence.
    """
    if not 0 <= row.label < classes:
        raise VideoError(
            f"has label {row.label} in the manifest, but there are {classes} classes: labels go from 0 to "
            f"{classes - 1}"
        )
    if row.frames < 1:
        raise VideoError(f"has {row.frames} frames in the manifest; a video has at least 1")
    if not (1 <= row.width <= MOST_PIXELS and 1 <= row.height <= MOST_PIXELS):
        raise VideoError(
            f"has frames of {row.width}x{row.height} pixels in the manifest; a side has 1 to {MOST_PIXELS}"
        )
    if not 0 <= row.fps < inf:
        raise VideoError(f"has {row.fps:g} frames per second in the manifest; that is a number, 0 or more")
    if row.offset < 0 or row.length < 0 or (row.offset and not row.length):
        raise VideoError(
            f"has offset {row.offset} and length {row.length} in the manifest; both are 0, or the length "
            "is 1 or more"
        )
    if not 0 <= row.weight < inf:
        raise VideoError(f"has weight {row.weight:g} in the manifest; a weight is a number, 0 or more")
    if not row.path:
        raise VideoError("has no path in the manifest")
    if "\0" in row.path:
        decode_path(row.path)
