"""Opening the file of a video: only ordinary files, and never more of one than it held when it was opened."""

import os
import stat
from errno import EINVAL
from pathlib import Path
from types import TracebackType

from pipelines.errors import VideoError


class VideoFile:
    """An ordinary file that is open for reading, with what PyAV asks of a file: read, seek and tell.

    It has no name, so FFmpeg goes by the content alone, as it does for a piece of a shard.

    with VideoFile(path) as file:
        data = file.read()
    """

    def __init__(self, path: Path) -> None:
        """Raises VideoError for what cannot be opened, and for what is no ordinary file, such as a device or
        a pipe; behind a link as well.
        """
        try:
            # The opened file is looked at, not the path, which may lead elsewhere a moment later. Without
            # O_NONBLOCK, opening a pipe waits for somebody to write to it.
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise VideoError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        """Bytes that it held when it was opened."""
        self._position = 0
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise VideoError("is no regular file")

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        os.close(self._descriptor)

    def read(self, most: int = -1) -> bytes:
        """The next bytes, up to `most` of them or up to the end; raises OSError where they cannot be read."""
        left = self.size - self._position
        wanted = left if most < 0 else min(left, most)
        parts: list[bytes] = []
        while wanted > 0 and (part := os.pread(self._descriptor, wanted, self._position)):
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_range(self, offset: int, length: int) -> bytes:
        """So many bytes from `offset` on; with length 0, all of them.

        Raises VideoError where they are not there or cannot be read.
        """
        there = max(0, self.size - offset)
        if there < length:
            raise VideoError(f"shard ends after {there} of {length} bytes")
        self.seek(offset)
        try:
            data = self.read(length or -1)
        except OSError as error:
            raise VideoError(f"cannot be read: {error.strerror}") from error
        if not data:
            raise VideoError("is empty (0 bytes)")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Raises OSError for a place before the beginning."""
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if begin + offset < 0:
            raise OSError(EINVAL, os.strerror(EINVAL))
        self._position = begin + offset
        return self._position

    def tell(self) -> int:
        return self._position
