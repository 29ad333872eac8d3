"""The slow checks in parts: each test in exactly one."""

from collections import Counter
from itertools import chain, pairwise

import pytest

from tests.shards import assign_shards, parse_shard

QUIET = ["-p", "no:faulthandler", "-p", "no:cacheprovider", "--collect-only", "-qq", "-m", "soak"]


class Collected:
    """A plugin that keeps the names of the tests that are chosen."""

    def __init__(self) -> None:
        self.test_ids: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.test_ids = [item.nodeid for item in session.items]


def collected(config: pytest.Config, *arguments: str) -> list[str]:
    found = Collected()
    pytest.main(["--rootdir", str(config.rootpath), *QUIET, *arguments], plugins=[found])
    return found.test_ids


def test_every_slow_check_is_in_exactly_one_shard(pytestconfig: pytest.Config) -> None:
    tests = pytestconfig.rootpath / "tests"
    everything = collected(pytestconfig, str(tests))
    sizes = Counter(assign_shards(everything, 3))
    assert len(everything) > 200 and set(sizes) == {1, 2, 3}
    assert all(len(everything) / 4 < size < len(everything) / 2 for size in sizes.values())
    # The option takes the tests that have its number, all of them and no others.
    some = [str(tests / "trainer" / name) for name in ("engine/test_guarded.py", "faults/test_spikes.py")]
    parts = [collected(pytestconfig, *some, "--shard", f"{number}/3") for number in (1, 2, 3)]
    expected = collected(pytestconfig, *some)
    assert Counter(chain(*parts)) == Counter(expected) and all(parts) and len(expected) > 50
    assert set(expected) < set(everything)
    shard_of = dict(zip(everything, assign_shards(everything, 3), strict=True))
    assert [{shard_of[test_id] for test_id in part} for part in parts] == [{1}, {2}, {3}]


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
