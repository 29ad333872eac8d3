"""Reads regular files only, and not beyond the size at opening."""

import os
import stat
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Protocol

from pipelines.errors import VideoError
from pipelines.storage.byte_range_file import ByteRange, ByteRangeFile, Seekable

LONG_FILE = 64 * 2**20  # bytes


class VideoFile(Seekable):
    """An open regular file with the methods that PyAV needs: read, seek and tell.

    It has no name, so FFmpeg detects the format from the content alone, as for a range of a shard.

    with VideoFile(path) as file:
        data = file.read()
    """

    def __init__(self, path: Path, offset: int = 0, length: int = 0) -> None:
        """
        Args:
            offset, length: the part of the file that is the video, in bytes; length 0 is all up to the end.

        Raises VideoError if `path`, or the target of a link, cannot be opened or is no regular file, or if it
        ends before the part does.
        """
        try:
            # fstat checks the open descriptor, as the path may be replaced meanwhile. Without O_NONBLOCK,
            # opening a pipe waits for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise VideoError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        status = os.fstat(self._descriptor)
        available = max(0, status.st_size - offset)
        self.size = length or available
        """Bytes of the video; of a whole file, those at opening."""
        self._offset = offset
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise VideoError("is no regular file")
        if available < length:
            os.close(self._descriptor)
            raise VideoError(f"shard ends after {available} of {length} bytes")

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def read(self, most: int = -1) -> bytes:
        """The next `most` bytes, or all up to the end; raises OSError."""
        left = self.size - self._position
        wanted = left if most < 0 else min(left, most)
        parts: list[bytes] = []
        while wanted > 0 and (part := os.pread(self._descriptor, wanted, self._offset + self._position)):
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def load(self, ranges: Sequence[ByteRange]) -> None:
        """Have the kernel read ranges, begin and end, that will be needed; returns at once."""
        for begin, end in ranges:
            os.posix_fadvise(self._descriptor, self._offset + begin, end - begin, os.POSIX_FADV_WILLNEED)

    def read_range(self, begin: int, end: int) -> bytes:
        """The bytes from `begin` to `end`; raises VideoError if they cannot be read."""
        self.seek(begin)
        try:
            data = self.read(end - begin)
        except OSError as error:
            raise VideoError(f"cannot be read: {error.strerror}") from error
        if not self.size:
            raise VideoError("is empty (0 bytes)")
        if len(data) < end - begin:
            raise VideoError(f"ends after {begin + len(data)} of {self.size} bytes")
        return data


@dataclass(frozen=True)
class FileRange:
    """A part of a local file, or all of it, that is opened when it is needed."""

    path: Path
    offset: int = 0
    length: int = 0
    """Bytes; 0 is all up to the end."""

    def open(self) -> VideoFile:
        """Raises VideoError as `VideoFile` does."""
        return VideoFile(self.path, self.offset, self.length)

    @cached_property
    def size(self) -> int:
        """Bytes of the video. Raises VideoError as `VideoFile` does."""
        with self.open() as file:
            return file.size

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; raises VideoError if they cannot be read."""
        with self.open() as file:
            if len(ranges) > 1:
                file.load(ranges)
            return [file.read_range(begin, end) for begin, end in ranges]


class OpenFile(Protocol):
    """What FFmpeg reads from."""

    def read(self, most: int = ..., /) -> bytes: ...

    def seek(self, offset: int, whence: int = ..., /) -> int: ...

    def tell(self) -> int: ...


class RangeFile(OpenFile, Protocol):
    """An open video whose ranges can be requested before they are read."""

    def load(self, ranges: Sequence[ByteRange]) -> None: ...


class RangedContent(Protocol):
    """A video that is opened when it is needed, and read in parts."""

    @property
    def size(self) -> int: ...

    def open(self) -> AbstractContextManager[RangeFile]: ...

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]: ...


@dataclass(frozen=True)
class LoadedContent:
    """A video of which some ranges are in memory, as read by `load_ranges`."""

    file: ByteRangeFile

    @property
    def size(self) -> int:
        return self.file.size

    def open(self) -> AbstractContextManager[RangeFile]:
        """The same file each time."""
        return nullcontext(self.file)

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range; raises what reading the video raises."""
        self.file.load(ranges)
        return [self._range(begin, end) for begin, end in ranges]

    def _range(self, begin: int, end: int) -> bytes:
        self.file.seek(begin)
        return self.file.read(end - begin)


def load_ranges(content: RangedContent, ranges: Sequence[ByteRange]) -> LoadedContent:
    """Read these ranges now; the others are read when they are needed. Raises what reading raises."""
    file = ByteRangeFile(content)
    file.load(ranges)
    return LoadedContent(file)


VideoContent = Path | bytes | RangedContent
"""A video: a file, its content, or what opens one."""


class _Content(BytesIO):
    """A video in memory."""

    def load(self, ranges: Sequence[ByteRange]) -> None:
        """Nothing is left to request."""


def open_content(source: VideoContent) -> AbstractContextManager[RangeFile]:
    """The open file of a video; raises VideoError as `VideoFile` does."""
    if isinstance(source, bytes):
        return _Content(source)
    return VideoFile(source) if isinstance(source, Path) else source.open()


def read_content(content: RangedContent) -> RangedContent | bytes:
    """All bytes of a video.

    A video of more than `LONG_FILE` bytes is left where it is: a recording of hours does not fit into memory.
    """
    size = content.size
    return content if size > LONG_FILE else content.read_ranges([(0, size)])[0]
