"""Checks an encoded video before a DALI graph decodes it: one bad sample would fail the whole batch."""

import io
import sys
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.manifest import ManifestRow
from pipelines.decode.color import check_colorspace, color_correction
from pipelines.decode.demux import VideoIndex, header_size, open_video, read_index
from pipelines.decode.frame_sizes import CODECS, has_one_size
from pipelines.decode.nvdec import SIDES, nvdec_refusal
from pipelines.decode.pyav import check_frames, check_size, decode_first_frame
from pipelines.errors import VideoError


class GraphDecoder(Enum):
    """DALI's decoder in a graph, by its device.

    It supports, in the sense of this module, videos whose frames it numbers as PyAV does, not all it decodes.
    """

    CPU = "cpu"
    NVDEC = "nvdec"

    @staticmethod
    def for_device(*, gpu: bool) -> "GraphDecoder":
        return GraphDecoder.NVDEC if gpu else GraphDecoder.CPU

    @property
    def codecs(self) -> frozenset[str]:
        """That it supports, by FFmpeg's names."""
        return frozenset(SIDES) if self is GraphDecoder.NVDEC else CODECS


PLACEHOLDER_SIZE = 64  # pixels a side; hardware decoders take nothing smaller than 48


class UnsupportedByGraph(VideoError):
    """A good video that the graph's decoder does not support, or whose frames it would number differently."""


@dataclass(frozen=True)
class GraphDecodeInput:
    """The inputs from which the graph decodes frames of a video: `sample_layout.ENCODED`."""

    video: NDArray[np.uint8]
    """The bytes of the file."""
    indices: NDArray[np.int32]
    """Frame numbers for the graph's decoder."""
    color: NDArray[np.float32]
    """(3, 4): the matrix and offset that make its RGB right (`color.color_correction`)."""
    orientation: NDArray[np.int32]
    """(3,): what makes its frames upright (`Orientation.flags`)."""


def check_encoded(
    data: bytes, row: ManifestRow, indices: NDArray[np.integer], decoder: GraphDecoder
) -> GraphDecodeInput:
    """The graph's input to decode the frames at `indices` with this decoder.

    Demuxes, and decodes the first frame: this finds a truncated file, but no damage inside the stream.

    Raises:
        VideoError: the file cannot be opened, or has frames of another size or fewer than requested.
        UnsupportedByGraph: only PyAV gives exactly these frames.
    """
    with open_video(data) as (container, stream):
        index = read_index(container, stream, keep_bytes=sys.maxsize)  # all of `data` is in memory anyway
        codec = stream.codec_context.codec.canonical_name
        colorspace = int(stream.codec_context.colorspace)
        check_frames(indices, len(index.display_order))
        if codec not in decoder.codecs:
            raise _not_for_graph(f"is {codec}", f"it supports {', '.join(sorted(decoder.codecs))}")
        if decoder is GraphDecoder.NVDEC and (refused := nvdec_refusal(stream.codec_context, codec, index)):
            raise _not_for_graph(*refused)
        if reason := _numbered_otherwise(index, decoder):
            raise _not_for_graph(reason, "it would return other frames than requested")
        _, shape = decode_first_frame(data, stream, index)
        if decoder is GraphDecoder.CPU:
            # It allocates and converts frames of the header's size. Other sizes make it read and write out of
            # bounds, which crashes the process.
            if header_size(data, stream.index) != (shape.height, shape.width):
                raise _not_for_graph(
                    "has frames of another size than its header says", "it uses the header's size"
                )
            if not has_one_size(codec, map(bytes, index.packets or ())):
                raise _not_for_graph("may change the size of its frames", "it converts all like the first")
    check_colorspace(colorspace)
    check_size(shape, (row.height, row.width))
    return GraphDecodeInput(
        np.frombuffer(data, np.uint8),
        np.asarray(indices, np.int32),
        color_correction(colorspace),
        shape.orientation.flags,
    )


def _not_for_graph(what: str, why: str) -> UnsupportedByGraph:
    return UnsupportedByGraph(
        f"{what}, which the graph's decoder does not support ({why}); set data.decoder to auto or hybrid, "
        "which leave such videos to PyAV, or to pyav"
    )


def _numbered_otherwise(index: VideoIndex, decoder: GraphDecoder) -> str:
    """Why the graph's decoder would number frames differently; empty if it would not.

    DALI numbers packets by their times. It may count, or fail over, a packet that is not a frame.
    """
    if not index.ordered:
        return "does not say when its frames are shown"
    if index.keyframes[0] > 0:
        return "begins before its first keyframe"
    if len(index.display_order) < len(index.times) and decoder is GraphDecoder.NVDEC:
        return "holds frames that are not shown"
    if decoder is GraphDecoder.NVDEC and any(time is not None and time < 0 for time in index.times):
        return "shows frames before time 0"
    return ""


@lru_cache(maxsize=2)
def placeholder_video(decoder: GraphDecoder) -> bytes:
    """A grey video of one frame, for a bad sample, in a codec that every such decoder supports."""
    name, options = ("libx264", {"crf": "30"}) if decoder is GraphDecoder.NVDEC else ("mjpeg", {})
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream(name, rate=1, options=options)
        stream.width = stream.height = PLACEHOLDER_SIZE
        stream.pix_fmt = "yuv420p" if name == "libx264" else "yuvj420p"
        grey = np.full((PLACEHOLDER_SIZE, PLACEHOLDER_SIZE, 3), 128, np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
