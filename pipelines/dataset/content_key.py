"""Keys of a video's content, by which copies are found without reading whole files."""

import hashlib
from pathlib import Path

from pipelines.decode.video_file import FileRange, RangedContent
from pipelines.errors import VideoError

BLOCK = 16 * 1024
"""Bytes that are compared at the beginning, in the middle and at the end of a video."""


def content_key(path: Path, offset: int = 0, length: int = 0) -> int:
    """`range_key` of a file or of a part of one; 0 if it cannot be read."""
    try:
        return range_key(FileRange(path, offset, length))
    except VideoError:
        return 0


def range_key(content: RangedContent) -> int:
    """A 64-bit hash of a video's size and of its first, middle and last bytes.

    Reads at most three blocks. Different videos have different keys, except with a probability of 2^-64 or if
    they have the same size and differ only between the blocks. Raises VideoError if it cannot be read.
    """
    size = content.size
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    begins = sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)})
    for block in content.read_ranges([(begin, min(size, begin + BLOCK)) for begin in begins]):
        digest.update(block)
    return int.from_bytes(digest.digest(), "little") or 1


def combined_key(*numbers: int) -> int:
    """A 64-bit hash of numbers, such as keys; never 0."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") or 1
