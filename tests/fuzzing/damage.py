"""Damages bytes: flips, cuts, repeats, mixes with another file, inserts large numbers and special words."""

import random
from collections.abc import Callable, Sequence

_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**64 - 1)
_WORDS = (
    b"&a *a", b"!!python/object", b"1e400", b"-0", b"nan", b"\x00", b"\xff\xfe", b"[[[[", b"{{", b"../",
    b"9" * 400, b"null", b"~", b"? ", b"<<: *a", b"\xe2\x80\xa8",
)  # fmt: skip


def damaged(whole: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the valid inputs, damaged in one to six ways."""
    data = bytearray(chance.choice(whole))
    for _ in range(chance.choice((1, 1, 1, 2, 3, 6))):
        chance.choice(_WAYS)(data, chance, whole)
    return bytes(data)


def _place(data: bytearray, chance: random.Random) -> int:
    """A random position; in large files mostly near the ends, where headers and indexes are."""
    near = min(len(data), chance.choice((64, 512, 4096, len(data))))
    offset = chance.randrange(near + 1)
    return offset if chance.random() < 0.7 else len(data) - offset


def _flip(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    for _ in range(chance.choice((1, 1, 4, 32))):
        if (place := _place(data, chance)) < len(data):
            data[place] ^= 1 << chance.randrange(8)


def _number(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    place, width = _place(data, chance), chance.choice((1, 2, 4, 8))
    value = chance.choice(_NUMBERS) % 256**width
    data[place : place + width] = value.to_bytes(width, chance.choice(("little", "big")))


def _cut(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    del data[_place(data, chance) :]


def _remove(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    place = _place(data, chance)
    del data[place : place + chance.choice((1, 2, 16, 400))]


def _repeat(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    place, count = _place(data, chance), chance.choice((1, 4, 60, 2000))
    data[place:place] = data[place : place + count] * chance.choice((1, 2, 20))


def _mix(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    other = chance.choice(whole)
    if other:
        begin = chance.randrange(len(other))
        place = _place(data, chance)
        data[place : place + chance.choice((0, 16, 1000))] = other[
            begin : begin + chance.choice((4, 100, 4000))
        ]


def _insert(data: bytearray, chance: random.Random, whole: Sequence[bytes]) -> None:
    place = _place(data, chance)
    data[place:place] = chance.choice(_WORDS)


_WAYS: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip, _flip, _number, _number, _cut, _remove, _repeat, _mix, _insert,
)  # fmt: skip
