"""A cache of byte ranges on a node's disk, of limited size, shared by all processes of the node.

A file holds one block. It is written under another name and renamed, so a killed process leaves no half
block. The blocks are divided among buckets by a hash of their name, and each bucket has its share of the
limit: a process that adds a block lists that bucket only and deletes its least recently used blocks. There is
no index, so nothing can contradict the files. As in a processor's set-associative cache, a bucket may be full
while another is not; buckets hold about 256 blocks, which makes the difference small.

The number of buckets follows from the limit. Limits of the same number share their blocks: each process keeps
to its own limit, so there are never more than the largest allows. Caches of another number in the same
folder are apart: each has a file that its processes lock (`flock`, shared), and one that nobody has locked is
deleted when another is opened. On a file system without locks, none is deleted.
"""

import fcntl
import hashlib
import logging
import os
import re
import tempfile
import time
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path
from zlib import crc32

from pipelines.atomic_file import STALE
from pipelines.errors import DataError
from pipelines.formatting import printable

BLOCK = 256 * 1024
"""Bytes of a block, the last one of a video excepted."""

MINIMUM = 64 * BLOCK
"""Least limit of a cache, in bytes."""

_PER_BUCKET = 256  # blocks
_CHECKSUM = 4  # bytes after the content
_PAGE = 4096  # bytes that file systems allocate at once: records of objects are smaller
_USED_AGAIN = 60.0  # seconds after which another use of a block is recorded
_OWN_FOLDER = re.compile(r"blocks-\d+")
_OWN_FILE = re.compile(r"[0-9a-f]{40}|.*\.partial")


logger = logging.getLogger(__name__)


class BlockCache:
    """Blocks by name. Errors of the disk cost the cached copy, never the read: callers fetch it again.

    A pickle of it is its folder and limit.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
            folder: on a local disk; made if it is missing. Other users cannot read it.
            limit: bytes, at least MINIMUM.

        Raises DataError where the folder cannot be written.
        """
        self.folder = folder
        self.limit = limit
        buckets = 1
        while buckets * _PER_BUCKET * BLOCK * 2 <= limit:
            buckets *= 2
        self._buckets = buckets
        self._bucket_limit = limit // buckets
        # The number of buckets is part of the path, since a block of another number would not be found.
        self._root = folder / f"blocks-{buckets}"
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if folder.stat().st_uid != os.geteuid():
                raise DataError(f"the cache {printable(folder)} belongs to another user: name another folder")
            lock = _open_lock(self._root)
            weakref.finalize(self, os.close, lock)
            locked = self._try_lock(lock, fcntl.LOCK_SH)  # before another process deletes it
            self._root.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self._root):
                pass
            if locked:
                self._remove_other_layouts()
        except OSError as error:
            raise DataError(f"the cache {printable(folder)} cannot be written: {error.strerror}") from error

    def __reduce__(self) -> tuple[type["BlockCache"], tuple[Path, int]]:
        return BlockCache, (self.folder, self.limit)

    def get(self, name: str) -> bytes | None:
        """The block called `name`, if the cache has it undamaged."""
        path = self._path(name)
        try:
            with path.open("rb") as file:
                content = file.read()
                used = os.fstat(file.fileno()).st_mtime
            if time.time() - used > _USED_AGAIN:
                os.utime(path)
        except OSError:
            return None
        data = content[:-_CHECKSUM]
        if crc32(data).to_bytes(_CHECKSUM, "little") == content[-_CHECKSUM:]:
            return data
        with suppress(OSError):
            path.unlink()
        return None

    def put(self, name: str, data: bytes) -> None:
        """Keep a block; deletes others of its bucket where they exceed its share of the limit."""
        path = self._path(name)
        size = len(data) + _CHECKSUM
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._make_space(path.parent, size)
            descriptor, partial = tempfile.mkstemp(suffix=".partial", dir=path.parent)
            try:
                with open(descriptor, "wb") as file:
                    file.write(data)
                    file.write(crc32(data).to_bytes(_CHECKSUM, "little"))
                os.replace(partial, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(partial)
                raise
        except OSError as error:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the cache %s keeps no more blocks: %s", printable(self.folder), error.strerror
                )

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return self._root / f"{int(digest[:8], 16) % self._buckets:05d}" / digest[8:48]

    def _make_space(self, bucket: Path, size: int) -> None:
        """Delete the least recently used blocks of a bucket until `size` more bytes are within its share."""
        now = time.time()
        blocks, total = [], _on_disk(size)
        with os.scandir(bucket) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # another process deleted it
                    status = entry.stat()
                    if entry.name.endswith(".partial") and now - status.st_mtime > STALE:
                        os.unlink(entry.path)
                        continue
                    length = _on_disk(status.st_size)
                    total += length
                    blocks.append((status.st_mtime, length, entry.path))
        for _, length, path in sorted(blocks):
            if total <= self._bucket_limit:
                return
            if path.endswith(".partial"):
                continue
            with suppress(FileNotFoundError):
                os.unlink(path)
            total -= length

    def _remove_other_layouts(self) -> None:
        """Delete the blocks of caches of another limit that no process uses: they would never be deleted.

        Files that are no blocks are kept: the folder may be one that has other content.
        """
        for other in self.folder.glob("blocks-*"):
            if other == self._root or not _OWN_FOLDER.fullmatch(other.name):
                continue
            lock = _open_lock(other)
            try:
                if not self._try_lock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    continue
                for folder, _, files in os.walk(other, topdown=False):
                    for name in filter(_OWN_FILE.fullmatch, files):
                        with suppress(OSError):
                            os.unlink(os.path.join(folder, name))
                    with suppress(OSError):
                        os.rmdir(folder)
            finally:
                os.close(lock)

    def _try_lock(self, lock: int, operation: int) -> bool:
        """Lock a file; False if another process has locked it, or, with a warning, if it cannot be locked."""
        try:
            fcntl.flock(lock, operation)
        except BlockingIOError:
            return False
        except OSError as error:
            _warn_without_locks(self.folder, error.strerror)
            return False
        return True


def _on_disk(size: int) -> int:
    """Bytes that a file takes: not `st_blocks`, which some file systems know only after seconds."""
    return -(-size // _PAGE) * _PAGE


@cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    """Once in a process."""
    logger.warning(
        "the cache %s: its file system does not lock files (%s). The cache is used; blocks of runs with "
        "another limit are not deleted: give all runs the same limit",
        printable(folder), reason,
    )  # fmt: skip


def _open_lock(blocks: Path) -> int:
    """The descriptor of the file beside the folder of a cache's blocks; closing it releases a lock."""
    return os.open(blocks.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
