"""What must be known of an encoded video before a DALI graph gets it, where one bad sample fails a batch."""

import io
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
from numpy.typing import NDArray

from . import VideoDefect
from .color import color_correction
from .container import VideoIndex, open_video, read_index
from .manifest import Row
from .pyav_decode import check_frames, check_size

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "mpeg4", "av1"}

# What NVDEC decodes in every codec and generation. It refuses H.264 in 4:2:2, 4:4:4 or 10 bits; of other
# codecs some generations take some of these, but the graph's conversion to RGB reads 8 bits in 4:2:0.
GPU_PIXELS = frozenset({"yuv420p", "yuvj420p"})

STAND_IN_SIZE = 64  # pixels a side; hardware decoders take nothing smaller than 48


class NotForGraph(VideoDefect):
    """A sound video that the graph's decoder does not take, or would number otherwise; PyAV decodes it."""


@dataclass(frozen=True)
class Encoded:
    """What the graph needs beside the bytes.

    indices: int32, frame numbers for the graph's decoder. color: float32, (3, 4), the matrix and offset that
    make its RGB right (`color.color_correction`).
    """

    indices: NDArray[np.int32]
    color: NDArray[np.float32]


def check_encoded(data: bytes, row: Row, indices: NDArray[np.integer], codecs: frozenset[str]) -> Encoded:
    """What the graph needs to decode the frames at `indices` with a decoder that takes `codecs`.

    Demuxes without decoding: a file cut short is seen, damage inside the stream is not.

    Raises:
        VideoDefect: the file cannot be opened, or has frames of another size or fewer than asked for.
        NotForGraph: a decoder for `codecs` cannot be expected to give these frames, PyAV can.
    """
    with open_video(data) as (container, stream):
        index = read_index(container, stream)
        codec = stream.codec_context.codec.canonical_name
        pixels = stream.codec_context.pix_fmt
        colorspace = stream.codec_context.colorspace
        size = (stream.height, stream.width)
    check_size(size, (row.height, row.width))
    check_frames(indices, len(index.shown))
    if codec not in codecs:
        raise _not_for_graph(f"is {codec}", f"it takes {', '.join(sorted(codecs))}")
    on_gpu = codecs > CPU_CODECS
    if on_gpu and pixels not in GPU_PIXELS:
        raise _not_for_graph(f"has pixels of {pixels}", f"it takes {', '.join(sorted(GPU_PIXELS))}")
    if reason := _numbered_otherwise(index, on_gpu):
        raise _not_for_graph(reason, "it would give other frames than were asked for")
    return Encoded(np.asarray(indices, np.int32), color_correction(colorspace))


def _not_for_graph(what: str, why: str) -> NotForGraph:
    return NotForGraph(f"{what}, which the graph's decoder does not take ({why}); set data.decoder to pyav")


def _numbered_otherwise(index: VideoIndex, on_gpu: bool) -> str:
    """Why the graph's decoder would count frames in another way; empty if it would not.

    DALI numbers packets by their times. What is not a frame here, it may count or stumble over.
    """
    if not index.ordered:
        return "does not say when its frames are shown"
    if index.keyframes[0] > 0:
        return "begins before its first keyframe"
    if len(index.shown) < len(index.times) and on_gpu:
        return "holds frames that are not shown"
    return ""


@lru_cache(maxsize=2)
def stand_in(codecs: frozenset[str]) -> bytes:
    """A grey clip of one frame, for a video that cannot be used, in a codec that the decoder surely takes."""
    name, options = ("libx264", {"crf": "30"}) if "h264" in codecs else ("mjpeg", {})
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(name, rate=1, options=options)
        stream.width = stream.height = STAND_IN_SIZE
        stream.pix_fmt = "yuv420p" if name == "libx264" else "yuvj420p"
        grey = np.full((STAND_IN_SIZE, STAND_IN_SIZE, 3), 128, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
