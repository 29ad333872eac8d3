"""A file of which ranges are in memory: its content, and how much of it stays there."""

from collections.abc import Sequence

import numpy as np
import pytest

from pipelines.storage import byte_range_file
from pipelines.storage.byte_range_file import ByteRangeFile

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()


class Reader:
    size = len(CONTENT)

    def __init__(self) -> None:
        self.fetched: list[tuple[int, int]] = []

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self.fetched += ranges
        return [CONTENT[begin:end] for begin, end in ranges]


def test_what_was_read_is_forgotten_and_what_was_loaded_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_READ_AHEAD", 500), ("_MOST_AHEAD", 4000), ("_MOST_KEPT", 20_000)):
        monkeypatch.setattr(byte_range_file, name, value)
    reader, chance = Reader(), np.random.default_rng(1)
    file = ByteRangeFile(reader)
    loaded = [(1000, 3000), (150_000, 190_000)]
    file.load(loaded)
    for _ in range(2):  # from the beginning to the end, as FFmpeg does
        file.seek(0)
        assert b"".join(iter(lambda: file.read(1500), b"")) == CONTENT
        assert sum(map(len, file._contents)) <= 42_000 + 20_000
    for begin, length in zip(chance.integers(0, 299_000, 300), chance.integers(1, 9000, 300), strict=True):
        file.seek(int(begin))
        assert file.read(int(length)) == CONTENT[begin : begin + length]
        assert sum(map(len, file._contents)) <= 42_000 + 20_000
    reader.fetched.clear()
    for begin, end in loaded:
        file.seek(begin)
        assert file.read(end - begin) == CONTENT[begin:end]
    assert not reader.fetched


def test_a_single_read_may_be_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_range_file, "_MOST_KEPT", 20_000)
    file = ByteRangeFile(Reader())
    file.load([(500, 600)])  # what is around it is fetched in two parts
    assert file.read() == CONTENT
