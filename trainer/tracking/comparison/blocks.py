"""What a report consists of, whatever it is shown as."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Cell:
    """best: whether it is the best of its column."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Column:
    """numeric: stands to the right. expendable: left out first, the highest number before others, where a
    terminal is too narrow; 0 never is. name: a run's name, of which the beginning may be cut. wraps: takes
    several lines.
    """

    head: str
    numeric: bool = True
    expendable: int = 0
    name: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG. text: what it shows."""

    png: bytes
    text: str


Block = Heading | Paragraph | Table | Picture
