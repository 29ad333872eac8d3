"""Looks into videos: what a manifest must know of them, and whether they can be used at all."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import av

from pipelines.decode.broken_files import describe_truncation
from pipelines.decode.color import check_colorspace
from pipelines.decode.demux import VideoIndex, open_video, read_index
from pipelines.decode.pyav import KEPT_BYTES, decode_all, decode_first_frame
from pipelines.errors import VideoError, format_unexpected
from pipelines.worker_pool import ordered_map

CRASHES = "crashes the process that decodes it"
HANGS = "keeps the process that decodes it for minutes"
MISSING = f"cannot be read: {os.strerror(errno.ENOENT)}"

# FFmpeg's numbers of transfer characteristics (ITU-T H.273, table 3).
HDR = {
    16: "HDR (PQ): colours are not tone-mapped",
    18: "HDR (HLG): colours are not tone-mapped",
}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is like."""

    frames: int
    """Counted packets that show a frame (`container.VideoIndex` says which do); what the container's header
    says can be zero, or more than there is. Counted by decoding where the container's times are of no use."""
    fps: float
    """Average frames per second; 0 where the file does not say."""
    width: int
    """Pixels, as shown: a rotation that the file asks for is applied."""
    height: int
    """Pixels, as shown: a rotation that the file asks for is applied."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ..."""
    keyframe_distance: int = 1
    """The most frames from one keyframe to the next, or to the end."""
    notes: tuple[str, ...] = ()
    """What is unusual, each in a few words that are the same for all videos of the kind."""


def probe_video(source: Path | bytes, *, deep: bool = False) -> VideoInfo:
    """Look into one video, given by its path or its bytes.

    Without `deep` it is demuxed and its first frame decoded, which costs 2 to 20 ms and sees missing and cut
    files, not damage inside the stream. A video whose container does not say in which order frames are shown
    is decoded to its end, to count them. With `deep` every frame is decoded and converted as a run does it,
    which sees what the codec lets be seen of it (the guide says how much that is).

    Raises:
        VideoError: the video cannot be used; the reason follows the file's name in a sentence. Whatever else
            a library raises over the file becomes one, too.
    """
    try:
        return _probe(source, deep=deep)
    except VideoError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("unforeseen error while probing a video", exc_info=True)
        raise VideoError(format_unexpected(error)) from error


def _probe(source: Path | bytes, *, deep: bool) -> VideoInfo:
    with open_video(source) as (container, stream):
        index = read_index(container, stream, keep_bytes=KEPT_BYTES)
        _check_whole(source, container, stream, index)
        rate = stream.average_rate or stream.guessed_rate
        codec = stream.codec_context.codec.canonical_name
        aspect = stream.sample_aspect_ratio or Fraction(1)
        still = container.format.name.endswith("_pipe") or container.format.name == "image2"
        gaps = index.gaps and container.format.name == "mpegts"
        first, shape = decode_first_frame(source, stream, index)
    check_colorspace(int(first.colorspace))
    frames = len(index.display_order)
    if deep or not index.ordered:
        frames = decode_all(source, index, convert=deep)
        if index.ordered and frames != len(index.display_order):
            raise VideoError(f"decodes to {frames} of {len(index.display_order)} frames")
    height, width = shape.display_size
    notes = (
        shape.orientation.description,
        "non-square pixels, used as they are" if aspect not in (0, 1) else "",
        HDR.get(int(first.color_trc), ""),
        "" if index.ordered else "no usable times: decoded from the start for each clip",
        "a still image" if still else "",
        "a transport stream with gaps, or several in one" if gaps else "",
    )
    return VideoInfo(
        frames,
        float(rate) if rate else 0.0,
        width,
        height,
        codec,
        index.keyframe_distance if index.ordered else frames,
        tuple(filter(None, notes)),
    )


def _check_whole(
    source: Path | bytes,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    index: VideoIndex,
) -> None:
    """Raises VideoError for an MP4 file that ends before the last frames that its index lists. FFmpeg says
    nothing, and gives those that are there, the last of them perhaps in part.
    """
    if not container.format.name.startswith("mov,"):
        return
    lacks = len(index.times) < stream.frames or bool(index.packets and index.packets[-1].is_corrupt)
    if lacks and (words := describe_truncation(source)):
        raise VideoError(words)


def probe_many(
    paths: Sequence[Path],
    *,
    workers: int,
    deep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[VideoInfo | VideoError, None, None]:
    """Probe each file and yield what it is like, or what is wrong with it, in the order of `paths`.

    Args:
        workers: processes; with more than one, the caller's main module must be importable.
        deep: decode every frame, too.
        progress: called after each file with the number of files probed and of all files.
    """
    return ordered_map(
        partial(_probe_or_defect, deep=deep),
        paths,
        total=len(paths),
        workers=workers,
        progress=progress,
        on_crash=lambda _: VideoError(CRASHES),
    )


def _probe_or_defect(path: Path, *, deep: bool) -> VideoInfo | VideoError:
    try:
        return probe_video(path, deep=deep)
    except VideoError as defect:
        return defect
