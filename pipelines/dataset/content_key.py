"""Keys of a video's content, by which copies are found without reading whole files."""

import hashlib
from pathlib import Path

from pipelines.decode.video_file import VideoFile
from pipelines.errors import VideoError

BLOCK = 16 * 1024
"""Bytes that are compared at the beginning, in the middle and at the end of a video."""


def content_key(path: Path, offset: int = 0, length: int = 0) -> int:
    """A 64-bit hash of a video's size and of its first, middle and last bytes; 0 if it cannot be read.

    Reads at most three blocks. Different videos have different keys, except with a probability of 2^-64 or if
    they have the same size and differ only between the blocks.
    """
    try:
        with VideoFile(path) as file:
            size = length or file.size
            digest = hashlib.blake2b(str(size).encode(), digest_size=8)
            for begin in sorted({0, max(0, (size - BLOCK) // 2), max(0, size - BLOCK)}):
                file.seek(offset + begin)
                digest.update(file.read(min(BLOCK, size - begin)))
    except (OSError, VideoError):
        return 0
    return int.from_bytes(digest.digest(), "little") or 1


def combined_key(*numbers: int) -> int:
    """A 64-bit hash of numbers, such as keys; never 0."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little") or 1
