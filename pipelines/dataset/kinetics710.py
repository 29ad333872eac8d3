"""The class names of Kinetics-400, -600, -700 and their union Kinetics-710.

`k400.txt`, `k600.txt`, `k700.txt`: the classes in the alphabetical order of common annotation lists.
`k710.txt`: the union, in the order of mmaction2. `synonyms.json`: names of the three → the union's name.

The authors of UniFormerV2 order the classes differently. `k400_released.txt`: their Kinetics-400, which is
also rows 0 to 399 of their Kinetics-710. `released_rows.json`: for each class of their Kinetics-600 and -700
its row in their Kinetics-710. The names of their rows 400 to 709, and of their Kinetics-600 and -700, are not
published.
"""

import json
from functools import cache
from pathlib import Path
from typing import Literal

Table = Literal["k400", "k600", "k700", "k710", "k400_released"]

_FOLDER = Path(__file__).parent / "labels"
UNION = 710
"""Classes of Kinetics-710."""


@cache
def class_names(table: Table) -> tuple[str, ...]:
    """The class names of a table, ordered by label."""
    return tuple((_FOLDER / f"{table}.txt").read_text(encoding="utf-8").splitlines())


@cache
def synonyms() -> dict[str, str]:
    """Class names of Kinetics-400, -600 or -700 that differ from Kinetics-710 → the name in Kinetics-710."""
    found: dict[str, str] = json.loads((_FOLDER / "synonyms.json").read_text(encoding="utf-8"))
    return found


@cache
def released_rows() -> dict[int, tuple[int, ...]]:
    """Number of classes, 600 or 700 → for each class in the authors' order, its row in their Kinetics-710."""
    read = json.loads((_FOLDER / "released_rows.json").read_text(encoding="utf-8"))
    return {int(name.removeprefix("k")): tuple(rows) for name, rows in read.items()}


def released_names() -> tuple[str | None, ...]:
    """The class names of the authors' Kinetics-710 by row; None where the name is not known."""
    known = class_names("k400_released")
    return (*known, *[None] * (UNION - len(known)))


@cache
def all_names() -> frozenset[str]:
    """Every class name of the four tables."""
    tables: tuple[Table, ...] = ("k400", "k600", "k700", "k710")
    return frozenset(name for table in tables for name in class_names(table))
