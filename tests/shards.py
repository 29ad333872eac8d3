"""Parts of the tests: `pytest -m soak --shard 2/3` runs the second of three parts of the slow ones."""

from collections import Counter
from collections.abc import Sequence
from zlib import crc32


def parse_shard(text: str) -> tuple[int, int]:
    """`2/3` → (2, 3). Raises ValueError for anything else."""
    number, _, total = text.partition("/")
    if not (number.isdecimal() and total.isdecimal() and 1 <= int(number) <= int(total)):
        raise ValueError(f"--shard {text}: expected a number and a total, such as 1/3")
    return int(number), int(total)


def assign_shards(test_ids: Sequence[str], total: int, whole_files: bool = False) -> list[int]:
    """The shard, from 1 to `total`, of each test.

    Each file is cut into `total` runs of consecutive tests, so that the shards take about the same time and
    tests with common fixtures mostly stay together. The first shard of a file depends on its name, so that
    files with one test are distributed too.

    test_ids: pytest's names, those of a file in the order in which they run. whole_files: keep the tests of a
    file together, for many files of short tests with common fixtures.
    """
    files = [test_id.partition("::")[0] for test_id in test_ids]
    sizes, seen = Counter(files), Counter[str]()
    shards = []
    for file in files:
        part = 0 if whole_files else seen[file] * total // sizes[file]
        shards.append((crc32(file.encode()) + part) % total + 1)
        seen[file] += 1
    return shards
