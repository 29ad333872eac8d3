"""Classes that a horizontal flip turns into another class, so that a flipped clip has a wrong label."""

import re
from collections.abc import Sequence

# Direction → pattern in lower-case text with single spaces.
_DIRECTIONS = {
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
_PATTERN = re.compile(
    r"\b(?:" + "|".join(f"(?P<{key}>{words})" for key, words in _DIRECTIONS.items()) + r")\b"
)


def mirrored_classes(class_names: Sequence[str]) -> tuple[str, ...]:
    """The classes whose names say that a horizontal flip turns them into another class.

    Words count whole and in any case, also within `move_left` or `MoveLeft`. A name with a direction counts
    only if another class has the mirrored direction, such as `from right to left` and `from left to right`:
    "right" alone may mean something else, and without a mirrored class no label becomes wrong.
    """
    directions = {name: _directions(name) for name in class_names}
    existing = {found for found in directions.values() if found}
    return tuple(
        name for name, found in directions.items() if tuple(_MIRRORED[word] for word in found) in existing
    )


def _directions(name: str) -> tuple[str, ...]:
    """The directions in a name, in order."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|[\W_]+", " ", name).lower()
    return tuple(str(found.lastgroup) for found in _PATTERN.finditer(words))
