"""What a reader of an annotation format hands over, before anyone has looked into the videos."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines import DataError


@dataclass(frozen=True, slots=True)
class Listing:
    """Videos with their labels, in the order they will have in the manifest."""

    videos: Sequence[tuple[Path, int]]
    """Each video's file and its label, an index into the class names."""
    class_names: tuple[str, ...]
    weights: Sequence[float] | None = None
    """How often training draws each video, compared with the others; None is all equally often."""


def read_class_names(path: Path) -> tuple[str, ...]:
    """The class names of a text file with one name a line, in the order of their labels.

    Raises:
        DataError: there is no such file, or it holds no name, or one twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of class names: {error}") from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        name = line.strip()
        if not name:
            raise DataError(f"{path}, line {number}: no class name")
        if name in seen:
            raise DataError(f"{path}, line {number}: class {name!r} already stands in line {seen[name]}")
        seen[name] = number
    if not seen:
        raise DataError(f"{path}: holds no class name")
    return tuple(seen)


def unknown_class(name: str, class_names: Sequence[str]) -> str:
    """Half a sentence about a name that is none of the classes, with the nearest that is."""
    near = difflib.get_close_matches(name, class_names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {len(class_names)} others"
    return f"class {name!r} is not among the class names; {hint}"
