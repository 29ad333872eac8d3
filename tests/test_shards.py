"""Shards of the slow tests: each test is in exactly one."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from tests.shards import assign_shards, parse_shard

# no:unraisableexception: it collects garbage for seconds after each run.
QUIET = [
    "-p", "no:faulthandler", "-p", "no:cacheprovider", "-p", "no:unraisableexception",
    "--collect-only", "-qq",
]  # fmt: skip
TOTAL = 3


class Collected:
    """A plugin that records the names of the selected tests."""

    def __init__(self) -> None:
        self.test_ids: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.test_ids = [item.nodeid for item in session.items]


def collected(config: pytest.Config, *arguments: str) -> list[str]:
    found = Collected()
    code = pytest.main(["--rootdir", str(config.rootpath), *QUIET, "-m", "soak", *arguments], plugins=[found])
    assert code == pytest.ExitCode.OK  # a file that cannot be imported would be missing from all shards
    return found.test_ids


def test_every_slow_check_is_in_exactly_one_shard(pytestconfig: pytest.Config) -> None:
    tests = pytestconfig.rootpath / "tests"
    everything = collected(pytestconfig, str(tests))
    assert len(set(everything)) == len(everything)
    marked = {str(path) for path in tests.rglob("test_*.py") if "mark.soak" in path.read_text()}
    marked -= {__file__}
    files = {test_id.partition("::")[0] for test_id in everything}
    assert {str(pytestconfig.rootpath / file) for file in files} == marked
    # Collecting takes seconds: the option is tested on one folder.
    some = collected(pytestconfig, str(tests / "integration"))
    parts = [
        collected(pytestconfig, str(tests / "integration"), "--shard", f"{number}/{TOTAL}")
        for number in range(1, TOTAL + 1)
    ]
    assert Counter(test_id for part in parts for test_id in part) == Counter(some)
    assert parts == in_shards(some)
    for part in in_shards(everything):
        assert len(everything) / 4 < len(part) < len(everything) / 2
    # A shard keeps the order of tests.
    order = {test_id: place for place, test_id in enumerate(some)}
    assert all(part == sorted(part, key=order.__getitem__) for part in parts)


def test_without_arguments_slow_tests_are_deselected(
    pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without paths and -m; a path alone selects all tests of the file."""
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\ntestpaths = ["tests"]\nmarkers = ["soak", "gpu", "on_device"]\n'
    )
    file = tmp_path / "tests" / "test_it.py"
    file.parent.mkdir()
    file.write_text("import pytest\n\ndef test_fast(): ...\n\n@pytest.mark.soak\ndef test_slow(): ...\n")
    conftest = (pytestconfig.rootpath / "tests" / "conftest.py").read_text(encoding="utf-8")
    (file.parent / "conftest.py").write_text(conftest, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for arguments, names in (([], ["fast"]), ([str(file)], ["fast", "slow"]), (["-m", "soak"], ["slow"])):
        found = Collected()
        pytest.main(["--rootdir", str(tmp_path), *QUIET, *arguments], plugins=[found])
        assert [test_id.rpartition("_")[2] for test_id in found.test_ids] == names


def in_shards(test_ids: list[str]) -> list[list[str]]:
    """The tests of each shard."""
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
    # Another file does not change the shards of this one.
    assert assign_shards(["tests/test_a.py::test_it", *test_ids], 3)[1:] == shards[:10]
    assert assign_shards(test_ids, 1) == [1] * 10
    assert len(set(assign_shards(test_ids, 3, whole_files=True))) == 1


def test_shards_of_whole_files_have_about_as_many_tests(pytestconfig: pytest.Config) -> None:
    folder = str(pytestconfig.rootpath / "tests" / "pipelines")
    halves = [
        collected(pytestconfig, folder, "--shard", f"{number}/2", "--whole-files", "-m", "not soak")
        for number in (1, 2)
    ]
    first, second = ({test_id.partition("::")[0] for test_id in half} for half in halves)
    assert not first & second
    assert min(map(len, halves)) > max(map(len, halves)) / 2


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "-1/3", "1/0", "a/b", "1/3/3", "1.0/3"])
def test_an_invalid_shard_raises(text: str) -> None:
    with pytest.raises(ValueError, match="--shard"):
        parse_shard(text)
    assert parse_shard("2/3") == (2, 3)
