"""Says what a file is that FFmpeg takes for no video: cut short, a web page, a pointer, zeros."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, suppress
from io import SEEK_END, BytesIO
from pathlib import Path

from pipelines.decode.video_file import VideoFile

NOT_WHOLE = "it was not copied or downloaded whole"

_BEGIN = 4096  # bytes in which text is recognised
_SHOWN = 40  # characters of text that a message shows
_MOST_ZEROS = 2**26  # bytes that are read to see whether there is anything but zeros
_MOST_BOXES = 100_000
_LFS = b"version https://git-lfs"

# Boxes that stand first in MP4 and QuickTime files, and those that a message explains (ISO/IEC 14496-12).
_FIRST = frozenset({b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"sidx"})
_MEANING = {b"moov": "index (moov)", b"mdat": "video data (mdat)", b"moof": "index of a fragment (moof)"}


def diagnose_file(file: VideoFile | BytesIO) -> str:
    """Why a file in which FFmpeg finds no video is none, in words that follow its name; empty where it is not
    known. Moves to another place in the file.
    """
    with suppress(OSError):
        file.seek(0)
        begin = file.read(_BEGIN)
        return _of_text(begin) or _of_zeros(file, begin) or _of_boxes(file)
    return ""


def describe_truncation(source: Path | bytes) -> str:
    """Where an MP4 or QuickTime file ends inside one of its boxes, that in words that follow its name; else
    empty. Raises VideoError for a file that is not there.
    """
    with ExitStack() as stack, suppress(OSError):
        file = stack.enter_context(VideoFile(source)) if isinstance(source, Path) else BytesIO(source)
        size = file.seek(0, SEEK_END)
        for name, begin, length in _boxes(file, size):
            if begin + length > size:
                what = _MEANING.get(name, f"box {name.decode('latin-1')!r}")
                return f"ends inside its {what}, after {size} of {begin + length} bytes: {NOT_WHOLE}"
    return ""


def _of_text(begin: bytes) -> str:
    if begin.startswith(_LFS):
        return "is a Git LFS pointer, not the video itself: fetch the videos with `git lfs pull`"
    markup = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    if markup.startswith(b"<") and (b"<html" in markup.lower() or b"<!doctype html" in markup.lower()):
        first = markup[:_SHOWN].decode("utf-8", "ignore").splitlines()[0].rstrip()
        return (
            f"is a web page, not a video: it begins with {first!r}, as what a server sends in place of a "
            "file that it does not give"
        )
    text = begin[:_SHOWN].decode("ascii", "replace").strip()
    # The header of a YUV4MPEG file is text, too.
    if text.isascii() and "".join(text.split()).isprintable() and text[:9] not in ("", "YUV4MPEG2"):
        return f"is not a video, but text that begins with {text.splitlines()[0]!r}"
    return ""


def _of_zeros(file: VideoFile | BytesIO, begin: bytes) -> str:
    if any(begin):
        return ""
    read = len(begin)
    while block := file.read(2**20):
        read += len(block)
        if any(block):
            return f"begins with zeros where a video has its header: {NOT_WHOLE}"
        if read >= _MOST_ZEROS:
            break
    return f"holds only zeros: {NOT_WHOLE}"


def _of_boxes(file: VideoFile | BytesIO) -> str:
    """What is wrong with an MP4 or QuickTime file, as far as its boxes show."""
    size = file.seek(0, SEEK_END)
    end, indexed, last = 0, False, b""
    for name, begin, length in _boxes(file, size):
        if begin + length > size and name == b"moov":
            return f"ends inside its index (moov), after {size} of {begin + length} bytes: {NOT_WHOLE}"
        end, last = begin + length, name
        indexed = indexed or name == b"moov"
    if not last or (indexed and end <= size):
        return ""
    if indexed:
        return f"ends inside its {_MEANING.get(last, 'last part')}, after {size} of {end} bytes: {NOT_WHOLE}"
    file.seek(min(end, size))
    if end < size and not any(file.read(_BEGIN)):
        return f"has zeros where its index (moov) is to be: {NOT_WHOLE}"
    if end == size:
        return f"has no index (moov): its recording was not finished, or {NOT_WHOLE}"
    return f"ends before its index (moov), after {size} bytes: {NOT_WHOLE}"


def _boxes(file: VideoFile | BytesIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of the boxes of an MP4 or QuickTime file, one after another; the last may reach
    beyond the end of the file. None where it is of another kind.
    """
    place = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        header = file.read(16)
        name, length = header[4:8], int.from_bytes(header[:4], "big")
        if len(header) < 8 or not name.isascii() or not any(name) or (place == 0 and name not in _FIRST):
            return
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:
            length = size - place  # to the end of the file
        if length < 8:
            return
        yield name, place, length
        place += length
