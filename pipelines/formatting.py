"""Text for messages: printable names, counts, lists and lines of limited width."""

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

WIDTH = 80
"""Columns of a terminal. Only a path may be longer."""

_UNPRINTABLE = re.compile(r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def printable(text: Path | str) -> str:
    r"""A path or text as valid UTF-8 on one line and without terminal commands, for messages, lists and JSON.

    Characters that cannot be printed are escaped as bash reads them between `$'` and `'`: `\xe9` for a byte
    that is not part of UTF-8, `\n`, `\x1b` or `\u0085` for a control character, `\\` for a backslash.
    """
    if isinstance(text, Path):
        text = os.fsencode(text).decode("utf-8", "surrogateescape")
    return _UNPRINTABLE.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] in _ESCAPES:
        return _ESCAPES[found[0]]
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def format_markdown_row(cells: Iterable[str]) -> str:
    """A row of a Markdown table; `|` in a cell does not end it."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def format_count(number: int, noun: str) -> str:
    """`1 video`, `2 videos`, `3 classes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


def format_size(count: float) -> str:
    """Bytes to three digits: `512 B`, `63.5 kB`, `1.07 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def format_list(items: Sequence[str], most: int, total: int | None = None) -> str:
    """`a, b and 3 more`: the first `most` of `items`, which may be fewer than their `total`."""
    more = (len(items) if total is None else total) - min(len(items), most)
    return ", ".join(items[:most]) + (f" and {more:,} more" if more > 0 else "")


def wrap(text: str, indent: str = "") -> list[str]:
    """Text as lines of at most `WIDTH` columns, unless a word is longer; `indent` before each, more later."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
