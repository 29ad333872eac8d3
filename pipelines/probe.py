"""Looks into videos: what a manifest must know of them, and whether they can be used at all."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from pipelines import VideoDefect
from pipelines.container import VideoIndex, decoder_of, open_video, read_index, stored_packets
from pipelines.parallel import ordered_map

CRASHES = "crashes the process that decodes it"


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video is like."""

    frames: int
    """Counted packets that show a frame (`container.VideoIndex` says which do); what the container's header
    says can be zero, or more than there is."""
    fps: float
    """Average frames per second; 0 where the file does not say."""
    width: int
    """Pixels, as coded: rotation metadata is not applied."""
    height: int
    """Pixels, as coded: rotation metadata is not applied."""
    codec: str
    """FFmpeg's name of the codec: `h264`, `vp9`, `mjpeg`, ..."""
    keyframe_distance: int = 1
    """The most frames from one keyframe to the next, or to the end."""
    notes: tuple[str, ...] = ()
    """What is unusual, each in a few words that are the same for all videos of the kind."""


def probe_video(source: Path | bytes, *, deep: bool = False) -> VideoInfo:
    """Look into one video, given by its path or its bytes.

    Without `deep` it is demuxed, which costs 1 to 10 ms and sees missing and cut files, not damage inside the
    stream. With `deep` every frame is decoded as well, which sees what the codec lets be seen of it: H.264
    and MJPEG notice most damage, VP9 only that of a frame's header.

    Raises:
        VideoDefect: the video cannot be used; the reason follows the file's name in a sentence.
    """
    with open_video(source) as (container, stream):
        index = read_index(container, stream)
        rate = stream.average_rate or stream.guessed_rate
        info = VideoInfo(
            frames=len(index.shown),
            fps=float(rate) if rate else 0.0,
            width=stream.width,
            height=stream.height,
            codec=stream.codec_context.codec.canonical_name,
        )
    if not (info.width and info.height):
        raise VideoDefect("has frames of no size")
    if deep:
        _decode_all(source, index)
    return info


def probe_many(
    paths: Sequence[Path],
    *,
    workers: int,
    deep: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[VideoInfo | VideoDefect, None, None]:
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
        on_crash=lambda _: VideoDefect(CRASHES),
    )


def _probe_or_defect(path: Path, *, deep: bool) -> VideoInfo | VideoDefect:
    try:
        return probe_video(path, deep=deep)
    except VideoDefect as defect:
        return defect


def _decode_all(source: Path | bytes, index: VideoIndex) -> None:
    frames, decoded = len(index.shown), 0
    with open_video(source) as (container, stream):
        codec = decoder_of(stream)
        packets = islice(stored_packets(container, stream), index.keyframes[0], None)
        for packet in chain(packets, [None]):
            for frame in codec.decode(packet):
                if index.start is not None and frame.pts is not None and frame.pts < index.start:
                    continue
                if frame.is_corrupt:
                    raise VideoDefect(f"is damaged in frame {decoded} of {frames}")
                decoded += 1
    if decoded != frames:
        raise VideoDefect(f"decodes to {decoded} of {frames} frames")
