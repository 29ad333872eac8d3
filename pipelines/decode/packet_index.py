"""The packets of a video by position in its file, so that a clip is read without the rest of the file.

FFmpeg's demuxer has to pass over a whole file to number its frames. The index keeps the result: where each
packet is, its times and flags, and which bytes FFmpeg reads to open the file. A reader then needs these bytes
and the packets that the wanted frames depend on; it builds the packets itself and never seeks.

A packet is indexed only if its bytes are one unchanged range of the file, and nothing but times and flags
belongs to it. A video with any other packet has no index and is read as a whole: transport and program
streams, Matroska with compressed headers, edit lists that hide frames, streams without usable times, or with
times since 1970 in units below a microsecond.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import av
import numpy as np
from numpy.typing import NDArray

from pipelines.decode.demux import VideoIndex, open_container, read_index, stored_packets
from pipelines.decode.video_file import OpenFile, VideoContent, open_content
from pipelines.errors import VideoError
from pipelines.storage.byte_range_file import ByteRange

_VERSION = 1
_NEAR = 64  # bytes between the position that a demuxer gives and the packet: the header of its block
_KEYFRAME, _CORRUPT, _NO_DECODE_TIME = 1, 2, 4
_MOST = 2**48  # bytes of a video, and the largest number in a record; a time is half of it at most
_MAX_PACKETS = 2**26  # of a record: 12 days at 60 frames a second
_MERGED = 64 * 1024  # bytes between two ranges that are read in one


@dataclass(frozen=True)
class PacketIndex:
    """The index of one video. Times are in units of the stream."""

    size: int
    """Bytes of the video."""
    crc: int
    """CRC-32 of the video."""
    opening: tuple[ByteRange, ...]
    """What FFmpeg reads to open the file."""
    begins: NDArray[np.int64]
    """First byte of each packet, in stored order."""
    sizes: NDArray[np.int64]
    """Bytes of each packet."""
    times: NDArray[np.int64]
    """Presentation times."""
    decode_times: NDArray[np.int64]
    """Decoding times."""
    flags: NDArray[np.uint8]
    display_order: NDArray[np.int64]
    """As in `VideoIndex`."""
    gaps: bool
    """As in `VideoIndex`."""

    @cached_property
    def video_index(self) -> VideoIndex:
        """As `demux.read_index` gives it, without the packets."""
        keyframes = np.flatnonzero(self.flags & _KEYFRAME).tolist()
        return VideoIndex(self.times.tolist(), keyframes, self.display_order.tolist(), True, None, self.gaps)

    def ranges(self, runs: Sequence[tuple[int, int]]) -> list[ByteRange]:
        """The bytes to open the file and to decode runs of packets, (first, last); ascending, and merged
        where they are close to each other."""
        wanted = [*self.opening]
        for first, last in runs:
            begins = self.begins[first : last + 1]
            ends = begins + self.sizes[first : last + 1]
            apart = np.flatnonzero((begins[1:] - ends[:-1] > _MERGED) | (begins[1:] < begins[:-1]))
            edges = [0, *(apart + 1).tolist(), len(begins)]
            wanted += [(int(begins[a:b].min()), int(ends[a:b].max())) for a, b in pairwise(edges)]
        return merge(wanted)

    def packets(
        self, file: OpenFile, stream: av.video.stream.VideoStream, first: int, last: int
    ) -> Iterator[av.Packet]:
        """The packets of a run as the demuxer would give them.

        file: of the video. stream: of a container that was opened from it. Raises VideoError where the file
        is too short.
        """
        for number in range(first, last + 1):
            begin, size, flags = (int(column[number]) for column in (self.begins, self.sizes, self.flags))
            file.seek(begin)
            content = file.read(size)
            if len(content) < size:
                raise VideoError(f"ends after {begin + len(content)} of {self.size} bytes")
            # Not Packet(content), which lacks the zeros that decoders may read after the end.
            packet = av.Packet(size)
            packet.update(content)
            packet.stream = stream
            packet.time_base = stream.time_base
            packet.pts = int(self.times[number])
            packet.dts = None if flags & _NO_DECODE_TIME else int(self.decode_times[number])
            packet.is_keyframe = bool(flags & _KEYFRAME)
            packet.is_corrupt = bool(flags & _CORRUPT)
            yield packet

    def to_bytes(self) -> bytes:
        """A compressed record: about 2 bytes for each packet."""
        columns = [
            np.diff(self.begins, prepend=0) - np.concatenate([[0], self.sizes[:-1]]),
            self.sizes,
            np.diff(self.times, prepend=0),
            self.decode_times - self.times,
            self.flags.astype(np.int64),
        ]
        opening = np.array(self.opening, np.int64).reshape(-1)
        order = self.display_order - np.arange(len(self.display_order))
        head = [_VERSION, self.size, self.crc, self.gaps, len(self.begins), len(opening), len(order)]
        numbers = np.concatenate([head, opening, *columns, order]).astype("<i8")
        # The bytes of equal significance together: most of them are zero.
        return zlib.compress(numbers.view(np.uint8).reshape(-1, 8).T.tobytes(), 6)

    @classmethod
    def from_bytes(cls, record: bytes | memoryview) -> PacketIndex:
        """The inverse of `to_bytes`.

        Raises VideoError for a damaged record.
        """
        try:
            return cls._parse(record)
        except (ValueError, zlib.error) as error:
            raise VideoError(f"has a damaged packet index ({error}): make it again") from error

    @classmethod
    def _parse(cls, record: bytes | memoryview) -> PacketIndex:
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(record, _MAX_PACKETS * 8 * 6)
        if not unpacker.eof or len(content) % 8 or len(content) < 7 * 8:
            raise ValueError("its record is not whole")
        numbers = np.frombuffer(content, np.uint8).reshape(8, -1).T.copy().view("<i8").reshape(-1)
        version, size, crc, gaps, count, opening_count, shown = numbers[:7].tolist()
        if version != _VERSION:
            raise ValueError(f"its record has version {version}")
        rest = numbers[7:]
        if min(count, shown) < 1 or opening_count < 0 or opening_count % 2 or not 0 <= size <= _MOST:
            raise ValueError("its counts are impossible")
        if len(rest) != opening_count + 5 * count + shown:
            raise ValueError("its counts do not fit its length")
        if not bool(((rest >= -_MOST) & (rest <= _MOST)).all()):
            raise ValueError("a number is too large")
        opening, rest = rest[:opening_count].reshape(-1, 2), rest[opening_count:]
        gap, sizes, time, decode, flags = rest[: 5 * count].reshape(5, count)
        order = rest[5 * count :] + np.arange(shown)
        begins = np.cumsum(gap + np.concatenate([[0], sizes[:-1]]))
        times = np.cumsum(time)
        if not (
            bool((begins >= 0).all() and (sizes > 0).all() and (begins + sizes <= size).all())
            and bool((opening >= 0).all() and (opening[:, 0] < opening[:, 1]).all())
            and bool((opening <= size).all())
        ):
            raise ValueError("a packet is outside the video")
        if not bool((order >= 0).all() and (order < count).all()) or len(np.unique(order)) < shown:
            raise ValueError("its order of frames is impossible")
        if not bool((flags & _KEYFRAME).any() and (flags & ~7 == 0).all()):
            raise ValueError("its flags are impossible")
        return cls(
            size,
            crc,
            tuple((int(begin), int(end)) for begin, end in opening),
            begins,
            sizes,
            times,
            times + decode,
            flags.astype(np.uint8),
            order,
            bool(gaps),
        )


def merge(ranges: Sequence[ByteRange], apart: int = _MERGED) -> list[ByteRange]:
    """The ranges in ascending order, those with at most `apart` bytes between them as one."""
    merged: list[ByteRange] = []
    for begin, end in sorted(ranges):
        if merged and begin - merged[-1][1] <= apart:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def make_packet_index(source: VideoContent) -> PacketIndex | None:
    """The index of a video; None where one of its packets cannot be indexed. Reads the whole video.

    Raises VideoError where the video cannot be opened.
    """
    with open_content(source) as file:
        recorded = _RecordingFile(file)
        rows: list[_Row] = []
        with open_container(recorded) as (container, stream):
            opening = merge(recorded.stop(), 0)
            for packet in stored_packets(container, stream):
                row = _index_packet(packet, file)
                if row is None:
                    return None
                rows.append(row)
        with open_container(file) as (container, stream):
            index = read_index(container, stream)
        if not index.ordered or len(index.times) != len(rows):
            return None
        size, crc = _checksum(file)
    begins, sizes, times, decode_times, flags = np.array(rows, np.int64).T
    if max(np.abs(times).max(), np.abs(decode_times).max()) > _MOST // 2:
        return None
    order = np.array(index.display_order, np.int64)
    return PacketIndex(
        size,
        crc,
        tuple(opening),
        begins,
        sizes,
        times,
        decode_times,
        flags.astype(np.uint8),
        order,
        index.gaps,
    )


_Row = tuple[int, int, int, int, int]


def _index_packet(packet: av.Packet, file: OpenFile) -> _Row | None:
    """Begin, size, times and flags of a packet; None if its bytes are no range of the file, or it has more
    properties. Leaves the file's position as it was."""
    position, time, decode_time = packet.pos, packet.pts, packet.dts
    if position is None or time is None or packet.is_discard or any(True for _ in packet.iter_sidedata()):
        return None
    content = bytes(packet)
    before = file.tell()
    file.seek(position)
    inside = file.read(len(content) + _NEAR).find(content)
    file.seek(before)
    if inside < 0:
        return None
    flags = _KEYFRAME * packet.is_keyframe + _CORRUPT * packet.is_corrupt
    if decode_time is None:
        return position + inside, len(content), time, time, flags + _NO_DECODE_TIME
    return position + inside, len(content), time, decode_time, flags


def checksum(source: VideoContent) -> tuple[int, int]:
    """Bytes and CRC-32 of a video, as its index has them. Reads all of it; raises what reading raises."""
    with open_content(source) as file:
        return _checksum(file)


def _checksum(file: OpenFile) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    file.seek(0)
    while block := file.read(2**20):
        size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


class _RecordingFile:
    """A file that records which ranges are read, until `stop`."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._ranges: list[ByteRange] | None = []

    def read(self, most: int = -1) -> bytes:
        begin = self._file.tell()
        data = self._file.read(most)
        if self._ranges is not None and data:
            self._ranges.append((begin, begin + len(data)))
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def stop(self) -> list[ByteRange]:
        ranges, self._ranges = self._ranges or [], None
        return ranges
