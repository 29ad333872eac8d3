"""The slow checks in parts: each test in exactly one."""

from collections import Counter
from itertools import pairwise

import pytest

from tests.shards import assign_shards, parse_shard

# no:unraisableexception: it collects garbage for seconds at each end.
QUIET = [
    "-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
    "--collect-only", "-qq", "-m", "soak",
]  # fmt: skip
TOTAL = 3


class Collected:
    """A plugin that keeps the names of the tests that are chosen."""

    def __init__(self) -> None:
        self.test_ids: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.test_ids = [item.nodeid for item in session.items]


def collected(config: pytest.Config, *arguments: str) -> list[str]:
    found = Collected()
    code = pytest.main(["--rootdir", str(config.rootpath), *QUIET, *arguments], plugins=[found])
    assert code == pytest.ExitCode.OK  # a file that cannot be imported would be missing from all parts alike
    return found.test_ids


def test_every_slow_check_is_in_exactly_one_shard(pytestconfig: pytest.Config) -> None:
    tests = pytestconfig.rootpath / "tests"
    everything = collected(pytestconfig, str(tests))
    assert len(set(everything)) == len(everything)
    marked = {str(path) for path in tests.rglob("test_*.py") if "mark.soak" in path.read_text()}
    marked -= {__file__}
    files = {test_id.partition("::")[0] for test_id in everything}
    assert {str(pytestconfig.rootpath / file) for file in files} == marked
    # Collecting takes seconds: the option itself is tried on a folder.
    some = collected(pytestconfig, str(tests / "integration"))
    parts = [
        collected(pytestconfig, str(tests / "integration"), "--shard", f"{number}/{TOTAL}")
        for number in range(1, TOTAL + 1)
    ]
    assert Counter(test_id for part in parts for test_id in part) == Counter(some)
    assert parts == in_shards(some)
    for part in in_shards(everything):
        assert len(everything) / 4 < len(part) < len(everything) / 2
    # In a part, the tests stand in the order that they have without parts.
    order = {test_id: place for place, test_id in enumerate(some)}
    assert all(part == sorted(part, key=order.__getitem__) for part in parts)


def in_shards(test_ids: list[str]) -> list[list[str]]:
    """The tests of each part."""
    shards = assign_shards(test_ids, TOTAL)
    return [
        [test_id for test_id, its in zip(test_ids, shards, strict=True) if its == number]
        for number in range(1, TOTAL + 1)
    ]


def test_a_large_file_is_spread_over_all_shards_in_runs() -> None:
    test_ids = [f"tests/test_one.py::test_it[{number}]" for number in range(10)]
    shards = assign_shards([*test_ids, "tests/test_other.py::test_it"], 3)
    assert sorted(Counter(shards[:10]).values()) == [3, 3, 4]
    assert sum(one != other for one, other in pairwise(shards[:10])) == 2
    # Another file does not change where these are, nor do the tests that are chosen in it.
    assert assign_shards(["tests/test_a.py::test_it", *test_ids], 3)[1:] == shards[:10]
    assert assign_shards(test_ids, 1) == [1] * 10


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/0", "a/b", "1/3/3", "1.0/3"])
def test_what_is_no_part_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--shard"):
        parse_shard(text)
    assert parse_shard("2/3") == (2, 3)
