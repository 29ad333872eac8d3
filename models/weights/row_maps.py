"""Maps classes to rows of a classifier's head, by name or by order."""

from collections import Counter
from collections.abc import Mapping, Sequence

NO_SYNONYMS: Mapping[str, str] = {}


def normalise_name(name: str) -> str:
    """A class name without case, underscores and repeated blanks."""
    return " ".join(name.casefold().replace("_", " ").split())


def match_rows(
    head: Sequence[str | None], wanted: Sequence[str], synonyms: Mapping[str, str] = NO_SYNONYMS
) -> tuple[int | None, ...]:
    """The row in a head of each wanted class, or None; no row is used twice.

    head: the class name of each row, None if unknown. synonyms: other name → name, for both sides.

    Classes match by the same name, else by the same normalised name, else by synonyms. At each of these
    levels, a name with two classes on a side matches nothing. Numeric names carry no meaning: they match
    only if both lists are equal.
    """
    if list(head) == list(wanted):
        return tuple(range(len(head)))
    rows: list[int | None] = [None] * len(wanted)
    if all(name.isdecimal() for name in wanted):
        return tuple(rows)
    usual = {normalise_name(other): normalise_name(name) for other, name in synonyms.items()}
    taken: set[int] = set()
    for level in (str, normalise_name, lambda name: usual.get(normalise_name(name), normalise_name(name))):
        free = _unique({row: level(name) for row, name in enumerate(head) if name and row not in taken})
        sought = _unique({number: level(wanted[number]) for number, row in enumerate(rows) if row is None})
        for key, number in sought.items():
            if key in free:
                rows[number] = free[key]
                taken.add(free[key])
    return tuple(rows)


def _unique(keys: Mapping[int, str]) -> dict[str, int]:
    """Key → index, for keys with only one index."""
    counts = Counter(keys.values())
    return {key: index for index, key in keys.items() if counts[key] == 1}


def agrees_with_order(
    head: Sequence[str | None],
    rows: Sequence[int],
    wanted: Sequence[str],
    synonyms: Mapping[str, str] = NO_SYNONYMS,
) -> bool:
    """Whether the wanted classes have the order of `rows`.

    rows: the row in the head of each class in that order. head: the rows' names, None if unknown. The
    orders agree if more than half of the rows have names, and these are the names of the wanted classes at
    the same positions.
    """
    if len(rows) != len(wanted):
        return False
    usual = {normalise_name(other): normalise_name(name) for other, name in synonyms.items()}

    def key(name: str) -> str:
        return usual.get(normalise_name(name), normalise_name(name))

    named = [(head[row], name) for row, name in zip(rows, wanted, strict=True) if head[row] is not None]
    return 2 * len(named) > len(rows) and all(key(str(own)) == key(name) for own, name in named)
