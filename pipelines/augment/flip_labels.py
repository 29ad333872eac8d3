"""Which classes tell left from right, so that a flipped clip would bear the label of another."""

import re
from collections.abc import Sequence

# A side, and how to recognise it in lower-case words with one space between them.
_SIDES = {
    "left": r"left(?: ?ward| ?wards| ?hand| ?handed)?",
    "right": r"right(?: ?ward| ?wards| ?hand| ?handed)?",
    "counterclockwise": r"(?:counter|anti) ?clockwise",
    "clockwise": r"clockwise",
}
_MIRRORED = {
    "left": "right",
    "right": "left",
    "clockwise": "counterclockwise",
    "counterclockwise": "clockwise",
}
_WORDS = re.compile(r"\b(?:" + "|".join(f"(?P<{side}>{words})" for side, words in _SIDES.items()) + r")\b")


def mirrored_classes(class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes that a horizontal flip turns into another class, as far as their names say so.

    Whole words count, in any case and also as a part of `move_left` or `MoveLeft`. A name that tells a side
    counts only where another class has the mirrored one, such as `from right to left` beside `from left to
    right`: "right" alone may mean something else, and without its counterpart no label is contradicted.
    """
    sides = {name: _sides(name) for name in class_names}
    told = {side for side in sides.values() if side}
    return tuple(name for name, side in sides.items() if tuple(_MIRRORED[word] for word in side) in told)


def _sides(name: str) -> tuple[str, ...]:
    """The sides that a name tells, in its order."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", name).lower()
    return tuple(str(found.lastgroup) for found in _WORDS.finditer(parted))
