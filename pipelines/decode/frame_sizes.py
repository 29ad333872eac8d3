"""Checks from the headers whether all pictures of a stream have one size and one pixel layout.

DALI's CPU decoder sets up its conversion to RGB for the first frame and uses it for all later ones. A
smaller frame, or one with other planes, makes it read invalid memory, which ends the process.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress

from pipelines.decode.jpeg_headers import frame_headers
from pipelines.decode.picture_headers import Bits

_JPEG_ADOBE = re.compile(rb"\xff\xee..Adobe.{7}", re.DOTALL)  # APP14, which can mark the planes as RGB

_VP8_START = b"\x9d\x01\x2a"  # RFC 6386, 9.1
_VP9_SYNC = 0x498342  # frame_sync_code (VP9 bitstream specification, 6.2)
_VP9_RGB = 7  # color_space (the same, 7.2.2)
_VP9_HEADER = 32  # bytes that contain all header fields read here

CODECS = frozenset({"mjpeg", "vp8", "vp9"})
"""FFmpeg's names of the codecs that are checked."""

HeaderField = tuple[str, object]
"""Name and value of a header field."""


def has_one_size(codec: str, packets: Iterable[bytes]) -> bool:
    """Whether the headers of all pictures have the size and pixel layout of the first.

    codec: one of `CODECS`. Unreadable headers are skipped, as decoders refuse them.
    """
    headers = {"mjpeg": _jpeg_headers, "vp8": _vp8_headers, "vp9": _vp9_headers}[codec]
    first: dict[str, object] = {}
    for packet in packets:
        with suppress(IndexError):
            for name, value in headers(packet):
                if first.setdefault(name, value) != value:
                    return False
    return True


def _jpeg_headers(packet: bytes) -> Iterator[HeaderField]:
    """Each frame header as a whole, with the mark for RGB planes."""
    adobe = b"".join(_JPEG_ADOBE.findall(packet))
    for header in frame_headers(packet):
        yield "frame", header + adobe


def _vp8_headers(packet: bytes) -> Iterator[HeaderField]:
    """Width, height and scaling of a key frame; other frames have none."""
    if not packet[0] & 1 and packet[3:6] == _VP8_START:
        yield "frame", packet[6:10]


def _vp9_headers(packet: bytes) -> Iterator[HeaderField]:
    """Pixel layout and size of the frames that have them; other frames use those of their references."""
    for frame in _vp9_frames(packet):
        yield from _vp9_header(Bits(frame[:_VP9_HEADER]))


def vp9_keyframe(packet: bytes) -> bool:
    """Whether the first frame in a packet of VP9 is a keyframe; its first few bytes suffice."""
    with suppress(IndexError):
        bits = Bits(packet)
        bits.read(2)
        if bits.read(1) + 2 * bits.read(1) == 3:
            bits.read(1)
        return not bits.read(1) and not bits.read(1)  # show_existing_frame, frame_type
    return False


def _vp9_frames(packet: bytes) -> Iterator[bytes]:
    """The frames of a packet, which may be a superframe (VP9 bitstream specification, annex B)."""
    last = packet[-1]
    count, width = (last & 7) + 1, (last >> 3 & 3) + 1
    index = 2 + count * width
    if last >> 5 != 0b110 or len(packet) < index or packet[-index] != last:
        yield packet
        return
    at = 0
    for number in range(count):
        entry = len(packet) - index + 1 + number * width
        size = int.from_bytes(packet[entry : entry + width], "little")
        if size:
            yield packet[at : at + size]
        at += size


def _vp9_header(bits: Bits) -> Iterator[HeaderField]:
    """Pixel layout and size in a frame's uncompressed header (VP9 bitstream specification, 6.2).

    Raises IndexError for a truncated header.
    """
    if bits.read(2) != 2:
        return
    profile = bits.read(1) + 2 * bits.read(1)
    if profile == 3:
        bits.read(1)
    if bits.read(1):  # show_existing_frame
        return
    inter, shown, resilient = bits.read(1), bits.read(1), bits.read(1)
    intra_only = inter and not shown and bits.read(1)
    if inter and not resilient:
        bits.read(2)  # reset_frame_context
    if inter and not intra_only:
        bits.read(8 + 3 * 4)  # refresh_frame_flags, three references
        if any(bits.read(1) for _ in range(3)):  # found_ref
            return
    else:
        if bits.read(24) != _VP9_SYNC:
            return
        yield "pixels", (profile, *(_vp9_pixels(bits, profile) if profile or not inter else (8, 1, 1)))
        if inter:
            bits.read(8)  # refresh_frame_flags
    yield "size", (bits.read(16), bits.read(16))


def _vp9_pixels(bits: Bits, profile: int) -> tuple[int, ...]:
    """color_config (the same, 6.2.2): bit depth, and chroma subsampling in x and y as 0 or 1."""
    depth = 10 + 2 * bits.read(1) if profile >= 2 else 8
    if bits.read(3) == _VP9_RGB:
        if profile & 1:
            bits.read(1)
        return (depth, 0, 0)
    bits.read(1)  # color_range
    if not profile & 1:
        return (depth, 1, 1)
    sampling = bits.read(1), bits.read(1)
    bits.read(1)
    return (depth, *sampling)
