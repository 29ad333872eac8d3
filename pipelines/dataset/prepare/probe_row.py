"""Probing the video of a listed row, and the frames of its segment."""

import stat
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.content_key import combined_key
from pipelines.dataset.manifest import ManifestRow, SourceKind, encode_path
from pipelines.dataset.probe import VideoInfo
from pipelines.dataset.source import open_source
from pipelines.decode.frame_stream import FrameStream, frames_between
from pipelines.errors import VideoError
from pipelines.formatting import printable

OTHER_LENGTH = 1.0
"""Seconds by which a video may be shorter or longer than the annotations say; of long ones a hundredth."""

_CACHED = 4  # videos: the segments of one follow one another


@dataclass(frozen=True, slots=True)
class ListedRow:
    """What is probed for a row of a listing."""

    path: Path
    source: SourceKind = SourceKind.FILE
    seconds: tuple[float, float] | None = None
    """Of the segment; None for a whole video."""
    duration: float = 0.0
    """Length of the whole video in seconds by the annotations; 0 if it is unknown."""


@dataclass(frozen=True, slots=True)
class ProbedRow:
    """A usable row."""

    info: VideoInfo
    """Of the row: `frames` are those of the segment."""
    key: int
    """The content key of the whole video."""
    first_frame: int = 0
    video_frames: int = 0
    """Of the whole video; 0 if the row is not a segment."""
    cut: str = ""
    """If the segment reaches beyond its video: its times and the video's length."""
    other_length: str = ""
    """If the length differs from that of the annotations: both."""

    @property
    def row_key(self) -> int:
        """A key that differs between segments of one video."""
        return combined_key(self.key, self.first_frame, self.info.frames) if self.video_frames else self.key


def probe_listed(row: ListedRow, *, deep: bool) -> ProbedRow | VideoError:
    """Probe the video of a row, once for consecutive rows of the same video."""
    probed = _probe(row.path, row.source, deep)
    if isinstance(probed, VideoError):
        return probed
    info, key = probed
    other_length = _other_length(info, row.duration)
    if row.seconds is None:
        return ProbedRow(info, key, other_length=other_length)
    timed = _times(row.path)
    if isinstance(timed, VideoError):
        return timed
    times, end_of_video = timed
    start, end = row.seconds
    if len(times) != info.frames:
        return VideoError(f"has {info.frames} frames, but times of {len(times)}")
    if start >= end_of_video or end <= 0:
        by_annotations = f" ({row.duration:g} s by the annotations)" if row.duration else ""
        return VideoError(
            f"has a segment from {start:g} to {end:g} s, but is {end_of_video:.2f} s long{by_annotations}"
        )
    first, frames = frames_between(times, start, end)
    beyond = start < 0 or end > end_of_video + 1 / max(info.fps, 1.0)
    cut = f"from {start:g} to {end:g} s in a video of {end_of_video:.2f} s" if beyond else ""
    return ProbedRow(replace(info, frames=frames), key, first, info.frames, cut, other_length)


@lru_cache(_CACHED)
def _probe(path: Path, source: SourceKind, deep: bool) -> tuple[VideoInfo, int] | VideoError:
    """The properties of a video, or its defect; and its content key."""
    try:
        mode = path.stat().st_mode
        if source == SourceKind.FILE and not stat.S_ISREG(mode):
            raise VideoError("is a folder" if stat.S_ISDIR(mode) else "is not a regular file")
        opened = open_source(path, ManifestRow(encode_path(path), 0, 0, 0, 1, 0, 1, 1, "", source=source))
        return opened.probe(deep=deep), opened.content_key()
    except VideoError as defect:
        return defect
    except OSError as error:
        return VideoError(f"cannot be read: {error.strerror}")


@lru_cache(_CACHED)
def _times(path: Path) -> tuple[NDArray[np.float64], float] | VideoError:
    """When each frame of a video file is shown, and when the last one ends."""
    try:
        stream = FrameStream(path)
    except VideoError as defect:
        return defect
    return stream.seconds, stream.duration


def _other_length(info: VideoInfo, expected: float) -> str:
    found = info.frames / info.fps if info.fps else 0.0
    if not expected or not found or abs(found - expected) <= max(OTHER_LENGTH, expected / 100):
        return ""
    return f"is {found:.2f} s long, {printable(f'{expected:g}')} s by the annotations"
