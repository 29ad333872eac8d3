"""Reads a small text file that may be anything: does not block on a pipe or read a device."""

import codecs
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_OTHER_ENCODINGS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_text(path: Path, most: int) -> str:
    """The text of an ordinary file of at most `most` bytes in UTF-8, with or without a byte order mark.

    Raises OSError where it cannot be read, and ValueError, with a message to follow the file's name, for any
    other kind of file and for one that changes while it is read.
    """
    with open_ordinary(path) as file:
        before = os.fstat(file.fileno())
        content = file.read(most + 1)
        if len(content) > most:
            raise ValueError(
                f"it has {max(before.st_size, len(content)):,} bytes; a recipe has at most {most:,}"
            )
        after = os.fstat(file.fileno())
    if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise ValueError("it changed while it was read; start again")
    if content.startswith(_OTHER_ENCODINGS):
        raise ValueError("not UTF-8 text: its first bytes say UTF-16 or UTF-32; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"not UTF-8 text: line {line} holds the byte 0x{content[error.start]:02X}; save it as UTF-8"
        ) from None


@contextmanager
def open_ordinary(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises OSError where it cannot be, ValueError for any other kind of file."""
    if "\0" in str(path):
        raise ValueError("no path may hold the character NUL")
    _check_kind(os.stat(path))  # before opening it: opening some devices has effects
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        _check_kind(os.fstat(handle))
        yield file


def _check_kind(found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"it is {_KINDS.get(kind, 'no file')}, not an ordinary file")
