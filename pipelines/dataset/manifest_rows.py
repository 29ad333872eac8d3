"""A row of a manifest, the kinds of sources, and the check of a row's values."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from math import inf

from pipelines.dataset.paths import decode_path
from pipelines.errors import VideoError

MOST_PIXELS = 2**16
"""Largest side of a frame: no codec of FFmpeg allows more."""


class SourceKind(IntEnum):
    """What a row's path names, by the number in the manifest's column `source`. Numbers are never reused."""

    FILE = 0
    """A video file, or a range of bytes of a file."""
    FRAMES = 1
    """A folder of JPEG frames with consecutive numbers in their names."""


@dataclass(frozen=True, slots=True)
class ManifestRow:
    """One video of a manifest, or a segment of one."""

    path: str
    """The file, encoded by `encode_path`; a relative path is relative to the manifest's folder."""
    offset: int
    """First byte of the video inside the file."""
    length: int
    """Number of bytes; offset 0 and length 0 are the whole file."""
    label: int
    """Index into the manifest's class names."""
    frames: int
    """Number of frames of the video, or of its segment, counted: the container's header may be wrong."""
    fps: float
    """Average frames per second; 0 if the file does not specify it. Stored as float32."""
    width: int
    """Pixels, after the rotation that the file specifies."""
    height: int
    """Pixels, after the rotation that the file specifies."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ...; `jpeg` of a folder of JPEG frames."""
    weight: float = 1.0
    """How often training draws the row relative to the others; 1 in a manifest without weights."""
    source: int = SourceKind.FILE
    """A `SourceKind`."""
    first_frame: int = 0
    """Number, in the video, of the segment's first frame; 0 for a whole video."""
    video_frames: int = 0
    """Number of frames of the video that the row is a segment of; 0 for a whole video."""

    @property
    def video(self) -> tuple[str, int, int]:
        """Path, offset and length of its video, which rows that are segments of it share."""
        return self.path, self.offset, self.length

    @property
    def is_segment(self) -> bool:
        """Whether the row is a part of a video's frames."""
        return self.video_frames > 0


_KINDS = frozenset(SourceKind)


def check_row(row: ManifestRow, classes: int) -> None:
    """Check that the row's values are possible for a video.

    Args:
        classes: number of classes of the manifest.

    Raises:
        VideoError: a value is not possible; the message continues a sentence that begins with the path.
    """
    for _, reason in row_problems(row, classes):
        raise VideoError(reason)


def row_problems(row: ManifestRow, classes: int) -> Iterator[tuple[str, str]]:
    """Each column whose value is not possible for a video, with the reason; see `check_row`."""
    if not 0 <= row.label < classes:
        yield (
            "label",
            f"has label {row.label} in the manifest, but there are {classes} classes: labels go from 0 to "
            f"{classes - 1}",
        )
    if row.frames < 1:
        yield "frames", f"has {row.frames} frames in the manifest; a video has at least 1"
    for name, side in (("width", row.width), ("height", row.height)):
        if not 1 <= side <= MOST_PIXELS:
            size = f"{row.width}x{row.height} pixels"
            yield name, f"has frames of {size} in the manifest; a side has 1 to {MOST_PIXELS}"
    if not 0 <= row.fps < inf:
        yield "fps", f"has {row.fps:g} frames per second in the manifest; it must be a number, 0 or more"
    if row.offset < 0 or row.length < 0 or (row.offset and not row.length):
        yield (
            "length" if row.offset >= 0 else "offset",
            f"has offset {row.offset} and length {row.length} in the manifest; both must be 0, or the length "
            "1 or more",
        )
    if not 0 <= row.weight < inf:
        yield "weight", f"has weight {row.weight:g} in the manifest; a weight must be a number, 0 or more"
    if row.source not in _KINDS:
        yield (
            "source",
            f"has source {row.source} in the manifest, which this program does not know; update the program",
        )
    whole = row.first_frame == row.video_frames == 0
    if not (whole or 0 <= row.first_frame <= row.video_frames - row.frames):
        yield (
            "first_frame" if row.first_frame < 0 or row.video_frames > 0 else "video_frames",
            f"has a segment of {row.frames} frames from frame {row.first_frame} on in the manifest, of a "
            f"video of {row.video_frames} frames",
        )
    if row.source == SourceKind.FRAMES and row.length:
        yield "length", f"is a folder of frames with length {row.length} in the manifest; it must be 0"
    if not row.path:
        yield "path", "has no path in the manifest"
    if "\0" in row.path:
        try:
            decode_path(row.path)
        except VideoError as defect:
            yield "path", str(defect)
