"""A video in an object store, read range by range, through the node's cache if there is one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from pipelines.errors import DataError, VideoError
from pipelines.storage.block_cache import BLOCK, MINIMUM, BlockCache
from pipelines.storage.byte_range_file import ByteRange, ByteRangeFile
from pipelines.storage.object_store import (
    PATIENCE,
    ObjectReplaced,
    check_url,
    object_size,
    object_version,
    read_ranges,
)

_REPLACED_AT_MOST = 3  # times, after which a read ends with an error
_VERSIONS = 4096  # objects whose version a process keeps


@dataclass(frozen=True)
class StorageOptions:
    """How objects are read."""

    cache: Path | None = None
    """Folder on the node's disk for the bytes read; None keeps none."""
    cache_bytes: int = 0
    """Most bytes in it, of all processes of the node together."""
    patience: float = PATIENCE
    """Seconds for which requests are repeated before a store counts as unavailable."""

    def __post_init__(self) -> None:
        """Raises DataError for a cache that is too small."""
        if self.cache is not None and self.cache_bytes < MINIMUM:
            raise DataError(f"a cache of {self.cache_bytes} bytes is too small: at least {MINIMUM}")

    @cached_property
    def blocks(self) -> BlockCache | None:
        """The cache; made at the first use in a process. Raises DataError where it cannot be written."""
        return None if self.cache is None else BlockCache(self.cache, self.cache_bytes)


DIRECT = StorageOptions()
"""Reads objects without a cache."""


@dataclass(frozen=True)
class RemoteRange:
    """The bytes of a video in an object.

    The cache's blocks are named by URL, offset, length and version: `version`, or that of the object in the
    store, for which a process asks once, and again where a later answer has another one.
    """

    url: str
    offset: int
    length: int
    """Bytes; 0 is the whole object, whose size the store is asked for."""
    options: StorageOptions = DIRECT
    version: str = ""
    """Changes with the content of the video, if that is known; the store is then not asked for it."""

    def __post_init__(self) -> None:
        """Raises DataError for a URL that cannot be used."""
        check_url(self.url)

    @cached_property
    def size(self) -> int:
        """Bytes of the video. Raises VideoError and StoreUnavailable."""
        return self.length or object_size(self.url, patience=self.options.patience) - self.offset

    def open(self) -> AbstractContextManager[ByteRangeFile]:
        """The video as a file."""
        return nullcontext(ByteRangeFile(self))

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range, counted from the beginning of the video. Fetches them at the same time.

        Raises:
            VideoError: the object is missing or too short.
            StoreUnavailable: the store is.
        """
        cache = self.options.blocks
        if cache is None:
            return self._fetch(ranges)
        if self.version:
            return self._read_cached(ranges, cache, self.version)
        for _ in range(_REPLACED_AT_MOST):
            version = _version_of(self.url, self.options.patience)
            try:
                return self._read_cached(ranges, cache, version, version)
            except ObjectReplaced:
                _version_of.cache_clear()
        raise VideoError(f"was replaced in the store {_REPLACED_AT_MOST} times while it was read")

    def _fetch(self, ranges: Sequence[ByteRange], expected: str = "") -> list[bytes]:
        absolute = [(self.offset + begin, self.offset + end) for begin, end in ranges]
        return read_ranges(self.url, absolute, patience=self.options.patience, version=expected)

    def _read_cached(
        self, ranges: Sequence[ByteRange], cache: BlockCache, version: str, expected: str = ""
    ) -> list[bytes]:
        """Whole blocks are fetched, and consecutive ones with one request.

        Args:
            version: of the blocks.
            expected: version that the object in the store must have; empty for any.
        """
        numbers = sorted({n for begin, end in ranges for n in range(begin // BLOCK, -(-end // BLOCK))})
        blocks = {number: cache.get(self._name(version, number)) for number in numbers}
        missing: list[list[int]] = []
        for number in numbers:
            if blocks[number] is None:
                if missing and missing[-1][-1] == number - 1:
                    missing[-1].append(number)
                else:
                    missing.append([number])
        wanted = [(run[0] * BLOCK, min((run[-1] + 1) * BLOCK, self.size)) for run in missing]
        for run, data in zip(missing, self._fetch(wanted, expected), strict=True):
            for position, number in enumerate(run):
                block = data[position * BLOCK : (position + 1) * BLOCK]
                blocks[number] = block
                cache.put(self._name(version, number), block)
        return [_cut(blocks, begin, end) for begin, end in ranges]

    def _name(self, version: str, number: int) -> str:
        return f"{self.url} {self.offset} {self.length} {version} {number}"


@lru_cache(_VERSIONS)
def _version_of(url: str, patience: float) -> str:
    """The version of an object; the store is asked once."""
    return object_version(url, patience=patience)


def _cut(blocks: dict[int, bytes | None], begin: int, end: int) -> bytes:
    first = begin // BLOCK
    joined = b"".join(blocks[number] or b"" for number in range(first, -(-end // BLOCK)))
    return joined[begin - first * BLOCK : end - first * BLOCK]
