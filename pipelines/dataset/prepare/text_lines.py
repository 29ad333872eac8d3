"""Text files: lines in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; rows of CSV; JSON."""

import codecs
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.formatting import printable

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, because it begins with the mark of UTF-16
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

_LONGEST_LINE = 2**20


@contextmanager
def open_lines(path: Path) -> Iterator[Iterator[str]]:
    """Yield the lines of a text file with their line ends. A byte that is not UTF-8 becomes a lone surrogate.

    Raises:
        OSError: there is no such file.
        UnicodeDecodeError: a file in UTF-16 or UTF-32 is damaged.
        DataError: the path is not a regular file, or a line has more than 2^20 characters, which bounds
            memory.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{printable(path)}: cannot be read: it is not a file")
    with path.open("rb") as binary:
        encoding = _encoding(binary.read(4096))
    errors = "strict" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
    with path.open(encoding=encoding, errors=errors, newline="") as file:

        def lines() -> Iterator[str]:
            number = 0
            while line := file.readline(_LONGEST_LINE):
                number += 1
                if len(line) == _LONGEST_LINE:
                    raise DataError(
                        f"{printable(path)}: cannot be read: line {number} is longer than {_LONGEST_LINE} "
                        "characters; is it a text file?"
                    )
                yield line

        yield lines()


def csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of its last line, and the fields, of each row of a CSV file that is not blank.

    Raises:
        DataError: no such file, or it is no CSV.
    """
    try:
        with open_lines(path) as lines:
            rows = csv.reader(lines)
            for row in rows:
                if row:
                    yield rows.line_num, row
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read as CSV: {error}") from error


def read_json(path: Path) -> Any:
    """The document of a JSON file.

    Raises:
        DataError: no such file, it is no JSON, or an object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{printable(path)}: has '{printable(twice)}' twice in one object; remove one")
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{printable(path)}: cannot be read as JSON: {error}") from error


def is_utf8(text: str) -> bool:
    """Whether every byte of the text was valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encoding(head: bytes) -> str:
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    # UTF-16 without a mark: every second byte of Latin letters is NUL.
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if 10 * odd > 3 * len(head) and not even:
        return "utf-16-le"
    if 10 * even > 3 * len(head) and not odd:
        return "utf-16-be"
    return "utf-8"
