"""Text files: lines in UTF-8, UTF-16 or UTF-32, with or without a byte order mark; rows of CSV; JSON."""

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
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
                if len(row) > 1 or (row and row[0].strip()):
                    yield rows.line_num, row
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{printable(path)}: cannot be read as CSV: {error}") from error


def find_columns(path: Path, header: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """Where the columns are in the header of a CSV file; those that it lacks are not in the result.

    Raises DataError for a name that the header has twice.
    """
    for name in names:
        if header.count(name) > 1:
            raise DataError(f"{printable(path)}, line 1: has the column {name} {header.count(name)} times")
    return {name: header.index(name) for name in names if name in header}


def check_fields(row: Sequence[str], header: Sequence[str], columns: dict[str, int], place: str) -> None:
    """Raises DataError, which names the place, for a row without one of the columns, or with more fields than
    its header has."""
    if len(row) <= max(columns.values()) or any(field.strip() for field in row[len(header) :]):
        hint = "; is a comma in a name not quoted?" if len(row) > len(header) else ""
        raise DataError(f"{place}: {len(row)} fields; the header has {len(header)}{hint}")


def read_json(path: Path) -> Any:
    """The document of a JSON file.

    Raises:
        DataError: no such file, it is no JSON, a text in it is not Unicode, or an object has a key twice.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{printable(path)}: cannot be read: it is not a file")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{printable(path)}: has '{printable(twice)}' twice in one object; remove one")
        return found

    try:
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content))
        document = json.loads(text, object_pairs_hook=unique)
        if "\\ud" in text or "\\uD" in text:  # half of a pair may be alone
            json.dumps(document, ensure_ascii=False).encode()
        return document
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
