"""What tests of several packages share."""

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.motion import render
from tests.shards import assign_shards, parse_shard


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="NUMBER/TOTAL", help="run one part of the chosen tests, such as 1/3")


@pytest.hookimpl(trylast=True)  # after -m and -k: the parts are those of the tests that are chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (shard := config.getoption("--shard")) is None:
        return
    try:
        number, total = parse_shard(shard)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    shards = assign_shards([item.nodeid for item in items], total)
    config.hook.pytest_deselected(
        items=[item for item, its in zip(items, shards, strict=True) if its != number]
    )
    items[:] = [item for item, its in zip(items, shards, strict=True) if its == number]


@dataclass(frozen=True)
class MotionSet:
    """A small rendered data set: 32 training and 16 validation clips of the embedded data set, seed 0."""

    root: Path
    train: Path
    """The training manifest."""
    val: Path
    """The validation manifest."""


@pytest.fixture(scope="session")
def motion_set(tmp_path_factory: pytest.TempPathFactory) -> MotionSet:
    """Read only: every test of the session sees the same files, in each of its processes."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The processes' own folders lie in one of the whole run: who comes first renders, the others wait.
        root = tmp_path_factory.getbasetemp().parent / "motion"
        root.mkdir(exist_ok=True)
    else:
        root = tmp_path_factory.mktemp("motion")
    with open(root.with_name("motion.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "val.arrow").exists():
            render(root, train_clips=32, val_clips=16, seed=0)
    return MotionSet(root, root / "train.arrow", root / "val.arrow")
