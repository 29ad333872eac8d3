"""The class names of Kinetics-400, -600, -700 and their union Kinetics-710.

`labels/kinetics710.csv` has a line for each class of the union: its name; its name and index in the
alphabetical lists of Kinetics-400, -600 and -700, empty where it is not among them; its row in the head of
mmaction2's models of Kinetics-710, which is also the order of the file; its row in the head of the authors'.

The authors of UniFormerV2 order the classes differently. Rows 0 to 399 of their Kinetics-710 are their
Kinetics-400. The names of their rows 400 to 709, and of their Kinetics-600 and -700, are not published, so
their row is empty for the other 310 classes. `labels/released_rows.json`: for each class of their
Kinetics-600 and -700 its row in their Kinetics-710.
"""

import csv
import json
from functools import cache
from pathlib import Path
from typing import Literal

Table = Literal["k400", "k600", "k700", "k710", "k400_released"]
TABLES: dict[int, Table] = {400: "k400", 600: "k600", 700: "k700", 710: "k710"}
"""By the number of classes, those in alphabetical order or mmaction2's."""

_FOLDER = Path(__file__).parent / "labels"
UNION = 710
"""Classes of Kinetics-710."""
_OF_TABLE: dict[Table, tuple[str, str]] = {
    "k400": ("k400_name", "k400_index"),
    "k600": ("k600_name", "k600_index"),
    "k700": ("k700_name", "k700_index"),
    "k710": ("class", "mmaction2_row"),
    "k400_released": ("k400_name", "released_row"),
}
"""The columns with the names and the order of a table."""


@cache
def _lines() -> tuple[dict[str, str], ...]:
    with (_FOLDER / "kinetics710.csv").open(encoding="utf-8", newline="") as file:
        return tuple(csv.DictReader(file))


@cache
def class_names(table: Table) -> tuple[str, ...]:
    """The class names of a table, ordered by label."""
    name, order = _OF_TABLE[table]
    found = {int(line[order]): line[name] for line in _lines() if line[order]}
    return tuple(found[label] for label in range(len(found)))


@cache
def synonyms() -> dict[str, str]:
    """Class names of Kinetics-400, -600 or -700 that differ from Kinetics-710 → the name in Kinetics-710."""
    names = [name for name, _ in _OF_TABLE.values()]
    return {
        line[name]: line["class"]
        for line in _lines()
        for name in names
        if line[name] and line[name] != line["class"]
    }


@cache
def released_rows() -> dict[int, tuple[int, ...]]:
    """Number of classes, 600 or 700 → for each class in the authors' order, its row in their Kinetics-710."""
    read = json.loads((_FOLDER / "released_rows.json").read_text(encoding="utf-8"))
    return {int(name.removeprefix("k")): tuple(rows) for name, rows in read.items()}


def union_rows(table: Literal["k400", "k600", "k700"]) -> tuple[int, ...]:
    """For each class of a table its row in mmaction2's Kinetics-710."""
    order = _OF_TABLE[table][1]
    found = {int(line[order]): int(line["mmaction2_row"]) for line in _lines() if line[order]}
    return tuple(found[label] for label in range(len(found)))


def released_names() -> tuple[str | None, ...]:
    """The class names of the authors' Kinetics-710 by row; None where the name is not known."""
    known = class_names("k400_released")
    return (*known, *[None] * (UNION - len(known)))


@cache
def all_names() -> frozenset[str]:
    """Every class name of the four tables."""
    return frozenset(name for table in TABLES.values() for name in class_names(table))
