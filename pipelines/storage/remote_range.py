"""A video in an object store, read range by range, through the node's cache if there is one."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pipelines.errors import DataError, VideoError
from pipelines.storage.block_cache import BLOCK, MINIMUM, BlockCache
from pipelines.storage.byte_range_file import ByteRange, ByteRangeFile
from pipelines.storage.object_records import ObjectRecords
from pipelines.storage.object_store import (
    PATIENCE,
    ObjectReplaced,
    check_url,
    object_size,
    read_ranges,
)

_REPLACED_AT_MOST = 3  # times, after which a read ends with an error


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

    @cached_property
    def records(self) -> ObjectRecords | None:
        """Of the objects with blocks in the cache; raises as `blocks`."""
        return None if self.blocks is None else ObjectRecords(self.blocks)


DIRECT = StorageOptions()
"""Reads objects without a cache."""


@dataclass(frozen=True)
class RemoteRange:
    """The bytes of a video in an object.

    The cache's blocks are named by URL, offset, length and version: `version`, or that of the object in the
    store (see `ObjectRecords`), which is asked again where a later answer has another one.
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
        if self.length:
            return self.length
        records, patience = self.options.records, self.options.patience
        if records is not None:
            return records.get(self.url, patience).size - self.offset
        return object_size(self.url, patience=patience) - self.offset

    def open(self) -> AbstractContextManager[ByteRangeFile]:
        """The video as a file."""
        return nullcontext(ByteRangeFile(self))

    def read_ranges(self, ranges: Sequence[ByteRange]) -> list[bytes]:
        """The bytes of each range, counted from the beginning of the video. Fetches them at the same time.

        Raises:
            VideoError: the object is missing or too short.
            StoreUnavailable: the store is.
        """
        cache, records, patience = self.options.blocks, self.options.records, self.options.patience
        if cache is None or records is None:
            return self._fetch(ranges)
        if self.version and self.length:
            return self._read_cached(ranges, cache, self.version, self.length)
        info = records.get(self.url, patience)
        for _ in range(_REPLACED_AT_MOST):
            size = self.length or info.size - self.offset
            try:
                return self._read_cached(ranges, cache, self.version or info.version, size, info.version)
            except ObjectReplaced:
                before, info = info, records.update(self.url, patience)
                if self.version and info.size != before.size:
                    raise VideoError("was replaced in the store by an object of another size") from None
        raise VideoError(f"was replaced in the store {_REPLACED_AT_MOST} times while it was read")

    def _fetch(self, ranges: Sequence[ByteRange], expected: str = "") -> list[bytes]:
        absolute = [(self.offset + begin, self.offset + end) for begin, end in ranges]
        return read_ranges(self.url, absolute, patience=self.options.patience, version=expected)

    def _read_cached(
        self, ranges: Sequence[ByteRange], cache: BlockCache, version: str, size: int, expected: str = ""
    ) -> list[bytes]:
        """Whole blocks are fetched, and consecutive ones with one request.

        Args:
            version: of the blocks.
            size: bytes of the video.
            expected: version that the object in the store must have; empty for any.
        """
        if (end := max((end for _, end in ranges), default=0)) > size:
            raise VideoError(f"ends after {size} of {end} bytes")
        numbers = sorted({n for begin, end in ranges for n in range(begin // BLOCK, -(-end // BLOCK))})
        blocks = {number: cache.get(self._name(version, number)) for number in numbers}
        missing: list[list[int]] = []
        for number in numbers:
            if blocks[number] is None:
                if missing and missing[-1][-1] == number - 1:
                    missing[-1].append(number)
                else:
                    missing.append([number])
        wanted = [(run[0] * BLOCK, min((run[-1] + 1) * BLOCK, size)) for run in missing]
        for run, data in zip(missing, self._fetch(wanted, expected), strict=True):
            for position, number in enumerate(run):
                block = data[position * BLOCK : (position + 1) * BLOCK]
                blocks[number] = block
                cache.put(self._name(version, number), block)
        return [_cut(blocks, begin, end) for begin, end in ranges]

    def _name(self, version: str, number: int) -> str:
        return f"{self.url} {self.offset} {self.length} {version} {number}"


def _cut(blocks: dict[int, bytes | None], begin: int, end: int) -> bytes:
    first = begin // BLOCK
    joined = b"".join(blocks[number] or b"" for number in range(first, -(-end // BLOCK)))
    return joined[begin - first * BLOCK : end - first * BLOCK]
