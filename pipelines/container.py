"""Opening a video file with PyAV, and finding its frames without decoding them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from . import VideoDefect


@contextmanager
def open_video(
    source: Path | bytes,
) -> Iterator[tuple["av.container.InputContainer", "av.video.stream.VideoStream"]]:
    """The open container and its first video stream; whatever FFmpeg says inside becomes a VideoDefect.

    Raises VideoDefect for a file that is missing, empty, no video, or found damaged while it is used.
    """
    if isinstance(source, Path):
        try:
            size = source.stat().st_size
        except OSError as error:
            raise VideoDefect(f"cannot be read: {error.strerror}") from error
    else:
        size = len(source)
    if size == 0:
        raise VideoDefect("is empty (0 bytes)")
    try:
        # Text in a file's tags may be in any encoding; nobody reads it here.
        with av.open(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), metadata_errors="ignore"
        ) as container:
            if not container.streams.video:
                raise VideoDefect("holds no video stream")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoDefect(f"is not a video, or is damaged: {_plain(error)}") from error


def frame_index(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream"
) -> tuple[list[int], list[int]]:
    """Presentation times of all frames and of the keyframes, ascending, without decoding."""
    times, keyframes = [], []
    for packet in container.demux(stream):
        if packet.pts is None or packet.size == 0 or packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keyframes.append(packet.pts)
    if not keyframes:
        raise VideoDefect("holds no keyframe")
    return sorted(times), sorted(keyframes)


def _plain(error: Exception) -> str:
    """FFmpeg's words without the error number before them and the file name after them."""
    return getattr(error, "strerror", None) or str(error)
