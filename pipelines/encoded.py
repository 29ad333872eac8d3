"""What must be known of an encoded video before a DALI graph gets it, where one bad sample fails a batch."""

import io
from functools import lru_cache

import av
import numpy as np

from . import VideoDefect
from .manifest import Row
from .probe import probe_video

CPU_CODECS = frozenset({"vp8", "vp9", "mjpeg"})
GPU_CODECS = CPU_CODECS | {"h264", "hevc", "mpeg4", "av1"}

STAND_IN_SIZE = 64  # pixels a side; hardware decoders take nothing smaller than 48


def check_encoded(data: bytes, row: Row, last_frame: int, codecs: frozenset[str]) -> None:
    """Raise VideoDefect unless a decoder for `codecs` can be expected to give frame `last_frame`.

    Demuxes without decoding: a file cut short is seen, damage inside the stream is not.
    """
    found = probe_video(data)
    if found.codec not in codecs:
        raise VideoDefect(
            f"is {found.codec}, which this decoder does not take (it takes {', '.join(sorted(codecs))}); "
            "set data.decoder to pyav"
        )
    if (found.width, found.height) != (row.width, row.height):
        raise VideoDefect(
            f"has frames of {found.width}x{found.height}, the manifest says {row.width}x{row.height}; "
            "the file changed since: make the manifest anew"
        )
    if last_frame >= found.frames:
        raise VideoDefect(f"holds {found.frames} frames, frame {last_frame} was asked for")


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
