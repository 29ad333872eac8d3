"""NVIDIA's video decoder: whether it is there, and which videos DALI decodes rightly with it.

DALI numbers its pictures by packets and by time, and notices little of what goes wrong (read in DALI 2.4's
code and libraries). So it is given what cannot go wrong that way; PyAV decodes the rest.
"""

import ctypes

import av

from pipelines.decode.demux import FIELDS_UNKNOWN, PROGRESSIVE, VideoIndex
from pipelines.decode.picture_headers import H264_IDR, nal_types

LIBRARY = "libnvcuvid.so.1"

# The least and the most pixels a side by codec, from NVIDIA's tables. A packet of VP8, VP9, AV1 or MPEG-4 may
# hold two pictures or none; there is no MJPEG, and many GPUs have no AV1.
SIDES = {"h264": (48, 4096), "hevc": (144, 8192)}

# In every generation it refuses H.264 in 4:2:2, 4:4:4 or 10 bits; of HEVC some take some of these, but the
# graph's conversion to RGB reads 8 bits in 4:2:0.
PIXELS = frozenset({"yuv420p", "yuvj420p"})

# Types of NAL units of HEVC that cannot be decoded where decoding began at the keyframe before them (ITU-T
# H.265, table 7-1).
RASL = frozenset({8, 9})


def has_nvdec() -> bool:
    """Whether its library is there: in a container it may be left out."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError:
        return False
    return True


def nvdec_refusal(
    context: "av.video.codeccontext.VideoCodecContext", codec: str, index: VideoIndex
) -> tuple[str, str] | None:
    """What of a video of one of `SIDES`' codecs is not for NVDEC, and why; None where nothing is.

    index: with its packets.
    """
    if context.pix_fmt not in PIXELS:
        return f"has pixels of {context.pix_fmt}", f"it takes {', '.join(sorted(PIXELS))}"
    least, most = SIDES[codec]
    if min(context.width, context.height) < least or max(context.width, context.height) > most:
        size = f"{context.width}x{context.height}"
        return f"has frames of {size}", f"it takes {least} to {most} pixels a side in {codec}"
    if context.field_order not in (FIELDS_UNKNOWN, PROGRESSIVE):
        return "is interlaced", "it may number fields"
    assert index.packets is not None
    extradata = context.extradata or b""
    first = bytes(index.packets[index.keyframes[0]])
    if codec == "h264" and H264_IDR not in nal_types(first, codec, extradata):
        return "begins with no IDR picture", "it would leave out the first frames"
    if codec == "hevc" and any(
        not RASL.isdisjoint(nal_types(bytes(packet), codec, extradata)) for packet in index.packets
    ):
        return "has open groups of pictures", "it may leave out frames after a jump"
    return None
