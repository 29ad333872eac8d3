"""Frame headers in a packet of Motion JPEG, found segment by segment as in FFmpeg.

Tables and metadata may contain any bytes, also those of a header marker. FFmpeg skips a valid segment as a
whole. Its behaviour at a damaged segment depends on the version, so after one, every marker counts as a
header.
"""

import re
from collections.abc import Callable, Iterator
from typing import Literal

# Start of frame: all of C0 to CF but DHT, JPG and DAC (ITU-T T.81, table B.1), and F7 (JPEG-LS).
_FRAME = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xf7]")
# All markers except restarts. Scan data contain none: there, 00 or a restart marker follows FF.
_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")

_DHT, _SOI, _EOI, _SOS, _DQT, _DRI, _APP1, _COM = 0xC4, 0xD8, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xFE
_APPS = range(0xE0, 0xF0)


def frame_headers(packet: bytes) -> Iterator[bytes]:
    """Each frame header from its marker on, with sampling and identifiers of the components.

    Headers inside metadata, such as a thumbnail's, are skipped.
    """
    at = 0
    while marker := _MARKER.search(packet, at):
        at = marker.end()
        code = packet[at - 1]
        segment = packet[at : at + int.from_bytes(packet[at : at + 2], "big")]
        if _FRAME.match(packet, at - 2):
            yield packet[at - 2 : at] + segment
        elif code in (_SOI, _EOI, _SOS):  # the search continues behind it, scans included
            continue
        if not _is_valid(code, segment):
            for frame in _FRAME.finditer(packet, at):
                length = int.from_bytes(packet[frame.end() : frame.end() + 2], "big")
                yield packet[frame.start() : frame.end() + length]
            return
        at += len(segment)


def _is_valid(code: int, segment: bytes) -> bool:
    """Whether a segment, with its two length bytes, is complete and valid, so that FFmpeg skips it."""
    if len(segment) < 2 or len(segment) != int.from_bytes(segment[:2], "big"):
        return False
    if code == _DQT:
        return _fills(segment, _quantisation_table)
    if code == _DHT:
        return _fills(segment, _huffman_table)
    if code == _APP1 and segment[2:6] == b"Exif":
        return _has_whole_directory(segment[8:])
    if _FRAME.match(bytes((0xFF, code))):
        return len(segment) > 7 and len(segment) == 8 + 3 * segment[7]
    return code in _APPS or code == _COM or (code == _DRI and len(segment) == 4)


def _fills(segment: bytes, table: Callable[[bytes], int]) -> bool:
    """Whether valid tables fill a segment. table: the length of the table at the start of its argument, or
    0."""
    at = 2
    while at < len(segment) and (length := table(segment[at:])):
        at += length
    return at == len(segment)


def _quantisation_table(at: bytes) -> int:
    wide, number = divmod(at[0], 16)
    return 1 + 64 * (1 + wide) if wide <= 1 and number <= 3 else 0


def _huffman_table(at: bytes) -> int:
    kind, number = divmod(at[0], 16)
    codes = sum(at[1:17])
    return 17 + codes if kind <= 1 and number <= 3 and codes <= 256 else 0


def _has_whole_directory(tiff: bytes) -> bool:
    """Whether Exif data contain their whole first directory, after which FFmpeg continues."""
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    at = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[at : at + 2], order)
    return at + 2 + 12 * entries + 4 <= len(tiff)
