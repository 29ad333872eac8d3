"""File names that are not UTF-8: how a manifest stores them, and how a message shows them.

On Linux a file name is a sequence of bytes without NUL and `/`. Python shows a byte that is not part of valid
UTF-8 as a lone surrogate, which can be written neither to Arrow, JSON or UTF-8 files nor to most terminals.
"""

import os
import re
import tempfile
from pathlib import Path

from pipelines.errors import VideoDefect

_ESCAPED = re.compile(rb"\0([89a-f][0-9a-f])")
_UNDECODED = re.compile("[\udc80-\udcff]")
_UNSHOWN = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_NAMED = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def encode_path(path: Path) -> str:
    """The path as text that is valid UTF-8: NUL and two hexadecimal digits for each byte that is not.

    A NUL cannot occur in a file name, so every other path is stored as it is.
    """
    text = os.fsencode(path).decode("utf-8", "surrogateescape")
    return _UNDECODED.sub(lambda byte: f"\0{ord(byte[0]) - 0xDC00:02x}", text)


def decode_path(text: str) -> Path:
    """The path that `encode_path` made `text` of.

    Raises:
        VideoDefect: the text holds a NUL that `encode_path` does not write.
    """
    name = text.encode()
    if b"\0" in name:
        name = _ESCAPED.sub(lambda byte: bytes([int(byte[1], 16)]), name)
        if b"\0" in name:
            raise VideoDefect("has a NUL character in its path")
    return Path(os.fsdecode(name))


def printable(text: Path | str) -> str:
    r"""Text for messages, lists and JSON, which is valid UTF-8, on one line and without terminal commands.

    What cannot be shown becomes an escape, as bash reads it between `$'` and `'`: `\xe9` for a byte that is
    not part of UTF-8, `\n`, `\x1b` or `\u0085` for a control character, `\\` for a backslash.
    """
    if isinstance(text, Path):
        text = os.fsencode(text).decode("utf-8", "surrogateescape")
    return _UNSHOWN.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in _NAMED:
        return _NAMED[found[0]]
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def check_writable(folder: Path) -> None:
    """Make sure that files can be written into a folder, or that it can be made. Leaves nothing behind.

    Raises:
        OSError: neither can be; its file name is the folder, or the closest one above it that is there.
    """
    there = folder.absolute()
    while not os.path.lexists(there):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(there)) from error
