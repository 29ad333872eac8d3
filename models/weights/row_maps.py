"""Which row of a classifier's head is which class: by name, and by order where the names are not known."""

from collections import Counter
from collections.abc import Mapping, Sequence

NO_SYNONYMS: Mapping[str, str] = {}


def normalise_name(name: str) -> str:
    """A class name without what spellings differ in: case, underscores, and how many blanks."""
    return " ".join(name.casefold().replace("_", " ").split())


def match_rows(
    head: Sequence[str | None], wanted: Sequence[str], synonyms: Mapping[str, str] = NO_SYNONYMS
) -> tuple[int | None, ...]:
    """For each wanted class its row in a head; None where the head has none. No row is given twice.

    head: the name of each row's class, None for one that is not known. synonyms: other name → name, for
    both sides.

    A class is found by the same name, else by the same normalised name, else by `synonyms`. A
    name that stands for two classes of a side at one of these levels finds nothing there. Names that are
    mere numbers tell nothing of the classes: they are found only where both lists are equal.
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
    """Index by key, of the keys that only one index has."""
    counts = Counter(keys.values())
    return {key: index for index, key in keys.items() if counts[key] == 1}


def agrees_with_order(
    head: Sequence[str | None],
    rows: Sequence[int],
    wanted: Sequence[str],
    synonyms: Mapping[str, str] = NO_SYNONYMS,
) -> bool:
    """Whether the wanted classes stand in an order that is known by rows of a head only.

    rows: for each class in that order its row in the head. head: the rows' names, many of which are not
    known. The order is that one if each wanted class whose row has a name has that name, and most have.
    """
    if len(rows) != len(wanted):
        return False
    usual = {normalise_name(other): normalise_name(name) for other, name in synonyms.items()}

    def key(name: str) -> str:
        return usual.get(normalise_name(name), normalise_name(name))

    named = [(head[row], name) for row, name in zip(rows, wanted, strict=True) if head[row] is not None]
    return 2 * len(named) > len(rows) and all(key(str(own)) == key(name) for own, name in named)
