"""Reads from picture headers what the display order depends on.

A B-picture is displayed before a picture that was decoded earlier, so a stream with B-pictures is not
stored in display order. A field picture is half a frame. Nothing is decoded here. Headers that cannot be
parsed count as unknown, which callers treat as the worse case.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

# Types of NAL units: ITU-T H.264, table 7-1, and ITU-T H.265, table 7-1.
H264_SLICE, H264_IDR, H264_SPS = 1, 5, 7
NAL_TYPE = {"h264": (0, 31), "hevc": (1, 63)}
"""Codec → shift and mask of the type in a NAL unit's first byte."""

_START_CODE = re.compile(b"\x00\x00\x01")
_EMULATED = re.compile(b"\x00\x00\x03")
_MPEG_PICTURE = re.compile(b"\x00\x00\x01\x00.(.)", re.DOTALL)  # ITU-T H.262, 6.2.3
_MPEG_GROUP = re.compile(b"\x00\x00\x01\xb8...(.)", re.DOTALL)  # ITU-T H.262, 6.2.2.6
_MPEG_CLOSED = 0x40  # closed_gop, after 25 bits of time code
_MPEG4_PICTURE = re.compile(b"\x00\x00\x01\xb6(.)", re.DOTALL)  # ISO/IEC 14496-2, 6.2.5
_MPEG_B = 3  # picture_coding_type, ITU-T H.262, table 6-12
_MPEG4_B = 2  # vop_coding_type, ISO/IEC 14496-2, table 6-20
_H264_B = frozenset({1, 6})  # slice_type, ITU-T H.264, table 7-6

# Profiles whose sequence parameter sets describe the chroma format (ITU-T H.264, 7.3.2.1.1).
_HIGH_PROFILES = frozenset({100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135})
_SPS_BYTES = 1024  # longer than one with all scaling lists; reading time grows with the square
_SLICE_BYTES = 32  # contain the fields that are read, emulation prevention included

SCANNED = frozenset({"h264", "mpeg1video", "mpeg2video", "mpeg4"})
"""FFmpeg's names of the codecs whose picture headers are read here."""


@dataclass(slots=True)
class PictureScan:
    """Properties of the pictures of a stream so far."""

    codec: str
    """One of `SCANNED`."""
    extradata: bytes
    """The codec's extradata in the container."""
    b_pictures: bool = False
    """Whether there was a B-picture."""
    field_pictures: bool = False
    """Whether there was a picture of a single field (H.264 only; packets of other codecs have both
    fields)."""
    _closed: bool = False
    """Whether the latest group of pictures of MPEG-1 and MPEG-2 is closed."""
    _anchors: int = 0
    """Pictures of MPEG-1 and MPEG-2 so far that others can refer to: all but B-pictures."""
    _frame_num_bits: int | None = None
    """Bits of colour_plane_id and frame_num in an H.264 stream that may have fields; None for frames only."""

    def __post_init__(self) -> None:
        if self.codec == "h264":
            self._read_parameter_sets(_parameter_sets_of(self.extradata))

    @property
    def may_have_fields(self) -> bool:
        """Whether the stream's parameters allow field pictures (H.264)."""
        return self._frame_num_bits is not None

    @property
    def may_lack_references(self) -> bool:
        """Whether a B-picture that comes next may lack a reference (MPEG-1 and MPEG-2)."""
        return self.codec.startswith(("mpeg1", "mpeg2")) and self._anchors < 2

    def add(self, packet: bytes) -> bool:
        """Read the headers of the picture in a packet; returns whether a decoder outputs it.

        MPEG-1 and MPEG-2 decoders drop B-pictures before the second possible reference, unless their group
        of pictures is closed.
        """
        decodable = True
        if self.codec == "h264":
            self._add_h264(packet)
            return decodable
        if self.codec == "mpeg4":
            found = _MPEG4_PICTURE.search(packet)
            self.b_pictures |= found is not None and found[1][0] >> 6 == _MPEG4_B
        elif found := _MPEG_PICTURE.search(packet):
            group = _MPEG_GROUP.search(packet, 0, found.start())
            self._closed = bool(group[1][0] & _MPEG_CLOSED) if group else self._closed
            if found[1][0] >> 3 & 7 != _MPEG_B:
                self._anchors += 1
            else:
                self.b_pictures = True
                decodable = self._closed or not self.may_lack_references
        return decodable

    def _add_h264(self, packet: bytes) -> None:
        for unit in nal_units(packet, "h264", self.extradata):
            kind = unit[0] & 31
            if kind == H264_SPS:
                self._read_parameter_sets([unit])
            elif kind in (H264_SLICE, H264_IDR):
                with suppress(IndexError):  # truncated: the decoder refuses it as well
                    self._add_slice(unit)
                return  # the first slice decides: all slices of a picture have the same field and type

    def _add_slice(self, unit: bytes) -> None:
        """ITU-T H.264, 7.3.3."""
        if self._frame_num_bits is None and unit[1] & 0x80:
            self.b_pictures |= unit[1] in _B_SLICE_STARTS
            return
        bits = Bits(_payload(unit[1 : 1 + _SLICE_BYTES]))
        bits.unsigned()  # first_mb_in_slice
        self.b_pictures |= bits.unsigned() in _H264_B
        if self._frame_num_bits is not None:
            bits.unsigned()  # pic_parameter_set_id
            bits.read(self._frame_num_bits)
            self.field_pictures |= bits.read(1) == 1

    def _read_parameter_sets(self, units: list[bytes]) -> None:
        for unit in units:
            with suppress(IndexError):
                frame_num_bits, frames_only = _sequence_parameters(unit)
                if not frames_only:  # one of several sets is enough
                    self._frame_num_bits = frame_num_bits


def nal_units(content: bytes, codec: str, extradata: bytes) -> Iterator[bytes]:
    """The NAL units in a packet of H.264 or HEVC, with their headers, without start codes or lengths."""
    # Offset of the length size in an avcC or hvcC record (ISO/IEC 14496-15, 5.3.3 and 8.3.3).
    offset = 4 if codec == "h264" else 21
    if extradata[:1] == b"\x01" and len(extradata) > offset:  # each unit follows its length
        size, position = (extradata[offset] & 3) + 1, 0
        while position + size < len(content):
            length = int.from_bytes(content[position : position + size], "big")
            position += size
            if length:
                yield content[position : position + length]
            position += length
        return
    start = None  # start codes: annex B of both standards
    for found in _START_CODE.finditer(content):
        if start is not None and start < found.start():
            yield content[start : found.start()]
        start = found.end()
    if start is not None and start < len(content):
        yield content[start:]


def nal_types(content: bytes, codec: str, extradata: bytes) -> Iterator[int]:
    """The types of the NAL units in a packet of H.264 or HEVC."""
    shift, mask = NAL_TYPE[codec]
    return (unit[0] >> shift & mask for unit in nal_units(content, codec, extradata))


def _parameter_sets_of(extradata: bytes) -> list[bytes]:
    """The sequence parameter sets of an H.264 stream's extradata: an avcC record, or start codes."""
    if extradata[:1] != b"\x01":
        return [unit for unit in nal_units(extradata, "h264", b"") if unit[0] & 31 == H264_SPS]
    units, position = [], 6  # ISO/IEC 14496-15, 5.3.3.1.2
    for _ in range(extradata[5] & 31 if len(extradata) > 5 else 0):
        length = int.from_bytes(extradata[position : position + 2], "big")
        units.append(extradata[position + 2 : position + 2 + length])
        position += 2 + length
    return [unit for unit in units if unit]


def _sequence_parameters(unit: bytes) -> tuple[int, bool]:
    """Bits of colour_plane_id and frame_num, and whether all pictures are frames (ITU-T H.264, 7.3.2.1.1).

    Raises IndexError for a truncated unit.
    """
    bits = Bits(_payload(unit[1:_SPS_BYTES]))
    profile = bits.read(8)
    bits.read(16)  # constraints, level
    bits.unsigned()  # seq_parameter_set_id
    planes = 0
    if profile in _HIGH_PROFILES:
        chroma = bits.unsigned()
        planes = bits.read(1) if chroma == 3 else 0
        bits.unsigned()  # luma depth
        bits.unsigned()  # chroma depth
        bits.read(1)
        if bits.read(1):
            for number in range(12 if chroma == 3 else 8):
                if bits.read(1):
                    _skip_scaling_list(bits, 16 if number < 6 else 64)
    frame_num_bits = bits.unsigned() + 4 + 2 * planes
    order = bits.unsigned()
    if order == 0:
        bits.unsigned()
    elif order == 1:
        bits.read(1)
        bits.unsigned()
        bits.unsigned()
        for _ in range(bits.unsigned()):
            bits.unsigned()
    bits.unsigned()  # reference frames
    bits.read(1)
    bits.unsigned()  # width
    bits.unsigned()  # height
    return frame_num_bits, bits.read(1) == 1


def _skip_scaling_list(bits: "Bits", size: int) -> None:
    """ITU-T H.264, 7.3.2.1.1.1."""
    last, following = 8, 8
    for _ in range(size):
        if following:
            coded = bits.unsigned()
            delta = (coded + 1) // 2 if coded % 2 else -(coded // 2)
            following = (last + delta) % 256
        last = following or last


def _payload(unit: bytes) -> bytes:
    """The unit without emulation prevention bytes (ITU-T H.264, 7.4.1)."""
    return _EMULATED.sub(b"\x00\x00", unit)


class Bits:
    """Reads the bits of a header, most significant first; raises IndexError beyond the end."""

    def __init__(self, header: bytes) -> None:
        self._bits = int.from_bytes(header, "big")
        self._left = 8 * len(header)

    def read(self, count: int) -> int:
        if count > self._left:
            raise IndexError("the header is truncated")
        self._left -= count
        return self._bits >> self._left & ((1 << count) - 1)

    def unsigned(self) -> int:
        """An Exp-Golomb code, ue(v) (ITU-T H.264, 9.1)."""
        zeros = 0
        while not self.read(1):
            zeros += 1
        return (1 << zeros) - 1 + self.read(zeros)


def _starts_b_slice(byte: int) -> bool:
    """Whether `byte`, behind the header of a NAL unit, starts a B-slice at the first macroblock."""
    bits = Bits(bytes([byte]))
    with suppress(IndexError):  # a slice_type that does not fit is none of the standard's
        return bits.unsigned() == 0 and bits.unsigned() in _H264_B
    return False


_B_SLICE_STARTS = frozenset(filter(_starts_b_slice, range(256)))
"""One byte has first_mb_in_slice 0 and any slice_type: a look-up takes a tenth of the time of `Bits`."""
