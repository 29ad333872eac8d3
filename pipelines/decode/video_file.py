"""Reads regular files only, and not beyond the size at opening."""

import os
import stat
from errno import EINVAL
from pathlib import Path
from types import TracebackType

from pipelines.errors import VideoError

LONG_FILE = 64 * 2**20  # bytes


class VideoFile:
    """An open regular file with the methods that PyAV needs: read, seek and tell.

    It has no name, so FFmpeg detects the format from the content alone, as for a range of a shard.

    with VideoFile(path) as file:
        data = file.read()
    """

    def __init__(self, path: Path) -> None:
        """Raises VideoError if `path`, or the target of a link, cannot be opened or is no regular file."""
        try:
            # fstat checks the open descriptor, as the path may be replaced meanwhile. Without O_NONBLOCK,
            # opening a pipe waits for a writer.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise VideoError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        """Bytes at opening."""
        self._position = 0
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise VideoError("is no regular file")

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def read(self, most: int = -1) -> bytes:
        """The next `most` bytes, or all up to the end; raises OSError."""
        left = self.size - self._position
        wanted = left if most < 0 else min(left, most)
        parts: list[bytes] = []
        while wanted > 0 and (part := os.pread(self._descriptor, wanted, self._position)):
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_range(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, or all up to the end if 0; raises VideoError if they cannot be
        read."""
        available = max(0, self.size - offset)
        if available < length:
            raise VideoError(f"shard ends after {available} of {length} bytes")
        self.seek(offset)
        try:
            data = self.read(length or -1)
        except OSError as error:
            raise VideoError(f"cannot be read: {error.strerror}") from error
        if not data:
            raise VideoError("is empty (0 bytes)")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position and return it; raises OSError for one before the beginning."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if begin + offset < 0:
            raise OSError(EINVAL, os.strerror(EINVAL))
        self._position = begin + offset
        return self._position

    def tell(self) -> int:
        return self._position


def read_content(path: Path, offset: int = 0, length: int = 0) -> Path | bytes:
    """A video's bytes: the whole file, or `length` bytes of a shard from `offset` on.

    For a file of more than `LONG_FILE` bytes its path: a recording of hours does not fit into memory.
    """
    with VideoFile(path) as file:
        if length == 0 and file.size > LONG_FILE:
            return path
        return file.read_range(offset, length)
