"""A writer of H.264 whose frames are pairs of field pictures (PAFF), which no encoder at hand makes.

Every macroblock is stored uncompressed (I_PCM), so the pictures come out as they went in.
"""

import re

FRAME_NUM_BITS, ORDER_BITS = 4, 8
I_PCM = 25  # mb_type in an I slice (ITU-T H.264, table 7-11)


class _Writer:
    def __init__(self) -> None:
        self._bits: list[str] = []

    def fixed(self, value: int, count: int) -> None:
        self._bits.append(f"{value:0{count}b}")

    def unsigned(self, *values: int) -> None:
        """Exp-Golomb codes (ITU-T H.264, 9.1)."""
        for value in values:
            code = f"{value + 1:b}"
            self._bits.append("0" * (len(code) - 1) + code)

    def align(self, bit: str) -> None:
        self._bits.append(bit * (-sum(map(len, self._bits)) % 8))

    def raw(self, content: bytes) -> None:
        self._bits.extend(f"{byte:08b}" for byte in content)

    def unit(self, header: int) -> bytes:
        """The NAL unit, with its start code."""
        self._bits.append("1")
        self.align("0")
        text = "".join(self._bits)
        payload = int(text, 2).to_bytes(len(text) // 8, "big")
        return b"\0\0\0\1" + bytes([header]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", payload)


def field_pictures(frames: int, *, width: int = 64, height: int = 64) -> bytes:
    """A stream of grey frames, in Annex B form: frame k has luma `grey(k)` in its top field, and one more in
    the other.
    """
    stream = _sequence_parameters(width, height) + _picture_parameters()
    macroblocks = (width // 16) * (height // 32)
    for number in range(frames):
        for bottom in (0, 1):
            stream += _field(number, bottom, macroblocks, idr=number == 0 and not bottom)
    return stream


def grey(number: int) -> int:
    return 40 + 4 * number


def _sequence_parameters(width: int, height: int) -> bytes:
    """ITU-T H.264, 7.3.2.1.1, Main profile."""
    bits = _Writer()
    bits.fixed(77, 8)
    bits.fixed(0, 8)
    bits.fixed(30, 8)
    bits.unsigned(0, FRAME_NUM_BITS - 4, 0, ORDER_BITS - 4, 1)
    bits.fixed(0, 1)
    bits.unsigned(width // 16 - 1, height // 32 - 1)
    bits.fixed(0b00100, 5)  # fields, not macroblock-adaptive, direct_8x8, no cropping, no VUI
    return bits.unit(0x67)


def _picture_parameters() -> bytes:
    """ITU-T H.264, 7.3.2.2."""
    bits = _Writer()
    bits.unsigned(0, 0)
    bits.fixed(0, 2)
    bits.unsigned(0, 0, 0)
    bits.fixed(0, 3)
    bits.unsigned(0, 0, 0)
    bits.fixed(0b100, 3)  # the slice says how it is deblocked
    return bits.unit(0x68)


def _field(number: int, bottom: int, macroblocks: int, *, idr: bool) -> bytes:
    """ITU-T H.264, 7.3.3 and 7.3.4."""
    bits = _Writer()
    bits.unsigned(0, 7, 0)  # the first macroblock, all slices are I, the parameter set
    bits.fixed(number % 2**FRAME_NUM_BITS, FRAME_NUM_BITS)
    bits.fixed(1, 1)
    bits.fixed(bottom, 1)
    if idr:
        bits.unsigned(0)
    bits.fixed((2 * number + bottom) % 2**ORDER_BITS, ORDER_BITS)
    bits.fixed(0, 2 if idr else 1)
    bits.unsigned(0, 1)  # quantiser, no deblocking
    for _ in range(macroblocks):
        bits.unsigned(I_PCM)
        bits.align("0")
        bits.raw(bytes([grey(number) + bottom]) * 256 + bytes([128]) * 128)
    return bits.unit(0x65 if idr else 0x21)
