"""A file of which only the requested ranges, and what was read last, are in memory."""

import os
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Sequence
from errno import EINVAL
from typing import Protocol

ByteRange = tuple[int, int]
"""Begin and end in bytes."""

_READ_AHEAD, _MOST_AHEAD = 128 * 1024, 8 * 2**20
"""Bytes fetched at least where what is read was not loaded; each time twice as many."""

_MOST_KEPT = 64 * 2**20
"""Bytes kept of what was not loaded: FFmpeg reads a recording of hours from the beginning to the end."""


class RangeReader(Protocol):
    """Bytes that can be read range by range."""

    @property
    def size(self) -> int:
        """Bytes of the whole."""

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range."""


class Seekable:
    """The position of a file of known size."""

    size: int
    _position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it; raises OSError for one before the beginning."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if begin + offset < 0:
            raise OSError(EINVAL, os.strerror(EINVAL))
        self._position = begin + offset
        return self._position

    def tell(self) -> int:
        return self._position


class ByteRangeFile(Seekable):
    """A file with the methods that PyAV needs: read, seek and tell.

    Ranges that are loaded in advance cost one round trip for all, and stay in memory; every other read costs
    one, and is forgotten when `_MOST_KEPT` more bytes were read so. Every method but `seek` and `tell` raises
    what `read_ranges` raises.
    """

    def __init__(self, reader: RangeReader) -> None:
        self.size = reader.size
        self._reader = reader
        self._ahead = _READ_AHEAD
        self._begins: list[int] = []  # of the ranges in memory, ascending; they do not overlap
        self._contents: list[bytes] = []
        self._read: deque[ByteRange] = deque()  # the ranges that were not loaded in advance
        self._kept = 0  # bytes of them

    def load(self, ranges: Sequence[ByteRange]) -> None:
        """Read the parts of `ranges` that are not yet in memory."""
        self._fetch(ranges)

    def _fetch(self, ranges: Sequence[ByteRange]) -> list[ByteRange]:
        missing = [part for begin, end in ranges for part in self._missing(begin, end)]
        for (begin, _), data in zip(missing, self._reader.read_ranges(missing), strict=True):
            place = bisect_right(self._begins, begin)
            self._begins.insert(place, begin)
            self._contents.insert(place, data)
        return missing

    def _read_on(self, begin: int, end: int) -> None:
        """Fetch a range, and forget the oldest ones that were fetched so."""
        new = self._fetch([(begin, end)])
        self._read += new
        self._kept += sum(high - low for low, high in new)
        while self._kept > _MOST_KEPT and len(self._read) > len(new):
            low, high = self._read.popleft()
            self._kept -= high - low
            place = bisect_left(self._begins, low)
            del self._begins[place], self._contents[place]

    def _missing(self, begin: int, end: int) -> list[ByteRange]:
        missing = []
        end = min(end, self.size)
        for place in range(max(0, bisect_right(self._begins, begin) - 1), len(self._begins)):
            low, high = self._begins[place], self._begins[place] + len(self._contents[place])
            if low >= end:
                break
            if begin < low:
                missing.append((begin, low))
            begin = max(begin, high)
        return [*missing, (begin, end)] if begin < end else missing

    def read(self, most: int = -1) -> bytes:
        """The next `most` bytes, or all up to the end."""
        end = self.size if most < 0 else min(self.size, self._position + most)
        parts = []
        while self._position < end:
            place = bisect_right(self._begins, self._position) - 1
            inside = self._position - self._begins[place] if place >= 0 else 0
            if place < 0 or inside >= len(self._contents[place]):
                self._read_on(self._position, max(end, self._position + self._ahead))
                self._ahead = min(2 * self._ahead, _MOST_AHEAD)
                continue
            part = self._contents[place][inside : inside + end - self._position]
            parts.append(part)
            self._position += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)
