"""Probing of videos: the properties that a manifest stores, and whether the video can be used."""

import errno
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

from pipelines.decode.broken_files import describe_truncation
from pipelines.decode.color import check_colorspace
from pipelines.decode.demux import VideoIndex, open_video, read_index
from pipelines.decode.jpeg_frames import frames_shape
from pipelines.decode.pyav import KEPT_BYTES, decode_all, decode_first_frame
from pipelines.decode.video_file import VideoContent
from pipelines.errors import VideoError, unexpected_as_video_error

CRASHES = "crashes the process that decodes it"
HANGS = "keeps the process that decodes it for minutes"
MISSING = f"cannot be read: {os.strerror(errno.ENOENT)}"

JPEG_FRAMES = "jpeg"
"""The codec of a folder of JPEG frames in a manifest: no name of FFmpeg's, as no video decoder reads it."""

# By FFmpeg's number of the transfer characteristics (ITU-T H.273, table 3).
HDR = {16: "HDR (PQ): colours are not tone-mapped", 18: "HDR (HLG): colours are not tone-mapped"}


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video."""

    frames: int
    """Number of packets that show a frame (see `demux.VideoIndex`), or of decoded frames if the container's
    timestamps are unusable. The number in the container's header can be 0 or too large."""
    fps: float
    """Average frames per second; 0 if the file does not specify it."""
    width: int
    """Pixels, after the rotation that the file specifies."""
    height: int
    """Pixels, after the rotation that the file specifies."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ...; `jpeg` of a folder of JPEG frames."""
    keyframe_distance: int = 1
    """Most frames from a keyframe to the next one, or to the end."""
    notes: tuple[str, ...] = ()
    """Unusual properties; videos with the same property have the same text."""


def probe_video(source: VideoContent, *, deep: bool = False) -> VideoInfo:
    """Probe one video, given by its path or its bytes.

    Without `deep`, the video is demuxed and its first frame decoded. That takes 2 to 20 ms and finds missing
    and truncated files, not damage inside the stream. If the container has no usable timestamps, all frames
    are decoded to count them. With `deep`, every frame is decoded and converted as in a run, which finds the
    damage that the codec detects (docs/guide.md says how much that is).

    Raises:
        VideoError: the video cannot be used; the message continues a sentence that begins with the path. Any
            other exception of a library is converted to one.
    """
    with unexpected_as_video_error():
        return _probe(source, deep=deep)


def probe_frames(folder: Path) -> VideoInfo:
    """Probe a folder of JPEG frames, all of which are decoded. Raises as `probe_video`."""
    with unexpected_as_video_error():
        frames, height, width = frames_shape(folder)
    return VideoInfo(frames, 0.0, width, height, JPEG_FRAMES)


def _probe(source: VideoContent, *, deep: bool) -> VideoInfo:
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
    source: VideoContent,
    container: av.container.InputContainer,
    stream: av.video.stream.VideoStream,
    index: VideoIndex,
) -> None:
    """Raises VideoError if an MP4 file ends before the last frames of its index. FFmpeg reports no error and
    returns the frames that are there, the last one possibly incomplete.
    """
    if not container.format.name.startswith("mov,"):
        return
    incomplete = len(index.times) < stream.frames or bool(index.packets and index.packets[-1].is_corrupt)
    if incomplete and (reason := describe_truncation(source)):
        raise VideoError(reason)
