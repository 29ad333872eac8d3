"""NVDEC: whether it is available, and which videos DALI decodes correctly with it.

DALI numbers pictures by packets and times and detects few errors (as read in DALI 2.4's code and
libraries). So it receives only videos for which this numbering is safe; PyAV decodes the others.
"""

import ctypes

import av

from pipelines.decode.demux import FIELDS_UNKNOWN, PROGRESSIVE, VideoIndex
from pipelines.decode.picture_headers import H264_IDR, nal_types

LIBRARY = "libnvcuvid.so.1"

# Minimum and maximum pixels per side by codec, from NVIDIA's tables. VP8, VP9, AV1 and MPEG-4 are excluded,
# as a packet may contain two pictures or none; NVDEC has no MJPEG, and many GPUs have no AV1.
SIDES = {"h264": (48, 4096), "hevc": (144, 8192)}

# No generation decodes H.264 in 4:2:2, 4:4:4 or 10 bits. Some decode HEVC in some of these, but the graph's
# conversion to RGB expects 8 bits in 4:2:0.
PIXELS = frozenset({"yuv420p", "yuvj420p"})

# HEVC NAL unit types that cannot be decoded if decoding started at the keyframe before them (ITU-T H.265,
# table 7-1).
RASL = frozenset({8, 9})


def has_nvdec() -> bool:
    """Whether the NVDEC library is installed; containers may lack it."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def nvdec_refusal(
    context: "av.video.codeccontext.VideoCodecContext", codec: str, index: VideoIndex
) -> tuple[str, str] | None:
    """The property of a video that rules out NVDEC, and the reason; None if NVDEC can decode it.

    codec: a key of `SIDES`. index: with its packets.
    """
    if context.pix_fmt not in PIXELS:
        return f"has pixels of {context.pix_fmt}", f"it supports {', '.join(sorted(PIXELS))}"
    least, most = SIDES[codec]
    if min(context.width, context.height) < least or max(context.width, context.height) > most:
        size = f"{context.width}x{context.height}"
        return f"has frames of {size}", f"it supports {least} to {most} pixels a side in {codec}"
    if context.field_order not in (FIELDS_UNKNOWN, PROGRESSIVE):
        return "is interlaced", "it may number fields"
    assert index.packets is not None
    extradata = context.extradata or b""
    first = bytes(index.packets[index.keyframes[0]])
    if codec == "h264" and H264_IDR not in nal_types(first, codec, extradata):
        return "begins with no IDR picture", "it would omit the first frames"
    if codec == "hevc" and any(
        not RASL.isdisjoint(nal_types(bytes(packet), codec, extradata)) for packet in index.packets
    ):
        return "has open groups of pictures", "it may leave out frames after a jump"
    return None
