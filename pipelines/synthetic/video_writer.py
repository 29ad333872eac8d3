"""Encodes frames to a video file; the same frames give the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
import numpy as np


@dataclass(frozen=True, slots=True)
class VideoFormat:
    """A container with an encoder."""

    extension: str
    """File name extension, with its dot."""
    container: str
    """FFmpeg's name of the container."""
    encoder: str
    """FFmpeg's name of the encoder."""
    codec: str
    """FFmpeg's name of the codec, as a probe of the file reports it."""
    pixel_format: str
    """FFmpeg's name of the pixel format."""
    options: MappingProxyType[str, str]
    """Encoder options, of nearly transparent quality."""


VP9 = VideoFormat(
    extension=".webm",
    container="webm",
    encoder="libvpx-vp9",
    codec="vp9",
    pixel_format="yuv420p",
    # The real-time mode takes half the time of "good", for files a third larger.
    options=MappingProxyType(
        {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0", "lag-in-frames": "0", "row-mt": "0"}
    ),
)
H264 = VideoFormat(
    extension=".mp4",
    container="mp4",
    encoder="libx264",
    codec="h264",
    pixel_format="yuv420p",
    # With AVX-512, x264 is not deterministic; cpu-independent also gives the same bytes on every CPU.
    options=MappingProxyType({"preset": "veryfast", "crf": "18", "x264-params": "cpu-independent=1"}),
)
MJPEG = VideoFormat(
    extension=".avi",
    container="avi",
    encoder="mjpeg",
    codec="mjpeg",
    pixel_format="yuvj420p",
    options=MappingProxyType({"qmin": "3", "qmax": "3"}),
)


def encode_video(
    path: Path, frames: np.ndarray, video_format: VideoFormat, fps: Fraction | int, keyframe_interval: int
) -> None:
    """Write `frames` to `path`, on one thread.

    Args:
        frames: T H W 3, uint8 RGB; H and W even, as 4:2:0 colour requires.
        fps: frames per second.
        keyframe_interval: at most this many frames from one keyframe to the next.

    Raises:
        ValueError: the height or width is odd.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"frames of {width}x{height}: 4:2:0 colour requires an even width and height")
    # bitexact: no random segment id and no program version in the header.
    with av.open(str(path), "w", format=video_format.container, options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            video_format.encoder, rate=Fraction(fps), options=dict(video_format.options)
        )
        stream.width, stream.height = width, height
        stream.pix_fmt = video_format.pixel_format
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = keyframe_interval
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
