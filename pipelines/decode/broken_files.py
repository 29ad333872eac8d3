"""Diagnoses files in which FFmpeg finds no video: truncated, a web page, a Git LFS pointer, zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from io import SEEK_END

from pipelines.decode.video_file import OpenFile, VideoContent, open_content

INCOMPLETE = "the copy or download is incomplete"

_BEGIN = 4096  # bytes that are checked for text
_QUOTED = 40  # characters of text that a message quotes
_MAX_ZEROS = 2**26  # bytes that are read to check for zeros
_MAX_BOXES = 100_000
_LFS = b"version https://git-lfs"

# Boxes that MP4 and QuickTime files begin with, and those that a message explains (ISO/IEC 14496-12).
_FIRST = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"sidx"})
_MEANING = {b"moov": "index (moov)", b"mdat": "video data (mdat)", b"moof": "index of a fragment (moof)"}


def diagnose_file(file: OpenFile) -> str:
    """Why FFmpeg finds no video in a file, as text that follows its name; empty if unknown. Moves the
    position."""
    with suppress(OSError):
        file.seek(0)
        begin = file.read(_BEGIN)
        return _diagnose_text(begin) or _diagnose_zeros(file, begin) or _diagnose_boxes(file)
    return ""


def describe_truncation(source: VideoContent) -> str:
    """The truncation of an MP4 or QuickTime file that ends inside a box, as text that follows its name;
    else empty.

    Raises VideoError for a missing file.
    """
    with open_content(source) as file, suppress(OSError):
        size = file.seek(0, SEEK_END)
        for name, begin, length in _boxes(file, size):
            if begin + length > size:
                what = _MEANING.get(name, f"box {name.decode('latin-1')!r}")
                return f"ends inside its {what}, after {size} of {begin + length} bytes: {INCOMPLETE}"
    return ""


def _diagnose_text(begin: bytes) -> str:
    if begin.startswith(_LFS):
        return "is a Git LFS pointer, not the video itself: fetch the videos with `git lfs pull`"
    markup = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if markup.startswith(b"<") and (b"<html" in markup.lower() or b"<!doctype html" in markup.lower()):
        first = markup[:_QUOTED].decode("utf-8", "ignore").splitlines()[0].rstrip()
        return (
            f"is a web page, not a video: it begins with {first!r}, as servers send when they refuse the file"
        )
    text = begin[:_QUOTED].decode("ascii", "replace").strip()
    # The header of a YUV4MPEG file is text, too.
    if text.isascii() and "".join(text.split()).isprintable() and text[:9] not in ("", "YUV4MPEG2"):
        return f"is not a video, but text that begins with {text.splitlines()[0]!r}"
    return ""


def _diagnose_zeros(file: OpenFile, begin: bytes) -> str:
    if any(begin):
        return ""
    read = len(begin)
    while block := file.read(2**20):
        read += len(block)
        if any(block):
            return f"begins with zeros instead of a header: {INCOMPLETE}"
        if read >= _MAX_ZEROS:
            break
    return f"holds only zeros: {INCOMPLETE}"


def _diagnose_boxes(file: OpenFile) -> str:
    """What is wrong with the boxes of an MP4 or QuickTime file; empty if nothing is found."""
    size = file.seek(0, SEEK_END)
    end, indexed, last = 0, False, b""
    for name, begin, length in _boxes(file, size):
        if begin + length > size and name == b"moov":
            return f"ends inside its index (moov), after {size} of {begin + length} bytes: {INCOMPLETE}"
        end, last = begin + length, name
        indexed = indexed or name == b"moov"
    if not last or (indexed and end <= size):
        return ""
    if indexed:
        return f"ends inside its {_MEANING.get(last, 'last part')}, after {size} of {end} bytes: {INCOMPLETE}"
    file.seek(min(end, size))
    if end < size and not any(file.read(_BEGIN)):
        return f"has zeros instead of its index (moov): {INCOMPLETE}"
    if end == size:
        return f"has no index (moov): its recording was not finished, or {INCOMPLETE}"
    return f"ends before its index (moov), after {size} bytes: {INCOMPLETE}"


def _boxes(file: OpenFile, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset and length of the boxes of an MP4 or QuickTime file; the last may end beyond the file.

    Yields nothing for a file of another format.
    """
    offset = 0
    for _ in range(_MAX_BOXES):
        file.seek(offset)
        header = file.read(16)
        name, length = header[4:8], int.from_bytes(header[:4], "big")
        if len(header) < 8 or not name.isascii() or not any(name) or (offset == 0 and name not in _FIRST):
            return
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:
            length = size - offset  # to the end of the file
        if length < 8:
            return
        yield name, offset, length
        offset += length
