"""Paths of any bytes: how a manifest stores them, and whether a folder can be written."""

import os
import re
import tempfile
from pathlib import Path

from pipelines.errors import VideoError
from pipelines.formatting import printable

_ESCAPED = re.compile(rb"\0([89a-f][0-9a-f])")
_UNDECODED = re.compile("[\udc80-\udcff]")


def encode_path(path: Path) -> str:
    """The path as text that is valid UTF-8: NUL and two hexadecimal digits for each byte that is not.

    A NUL cannot occur in a file name, so every other path is stored unchanged. (Python decodes a byte that is
    not UTF-8 as a lone surrogate, which Arrow and JSON cannot store.)
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda byte: f"\0{ord(byte[0]) - 0xDC00:02x}", text)


def decode_path(text: str) -> Path:
    """The inverse of `encode_path`.

    Raises:
        VideoError: the text holds a NUL that `encode_path` does not write.
    """
    name = text.encode()
    if b"\0" in name:
        name = _ESCAPED.sub(lambda byte: bytes([int(byte[1], 16)]), name)
        if b"\0" in name:
            raise VideoError("has a NUL character in its path")
    return Path(os.fsdecode(name))


def format_location(path: Path | str, offset: int = 0) -> str:
    """A video's file or URL for messages; of a video in a shard also its first byte."""
    return f"{printable(path)} at byte {offset}" if offset else printable(path)


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or that the folder can be made. Leaves nothing behind.

    Raises:
        OSError: neither is possible; its file name is the folder, or the closest existing one above it.
    """
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(existing)) from error
