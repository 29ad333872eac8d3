"""Options, markers and fixtures of all tests."""

import faulthandler
import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import pytest
import torch

from pipelines.synthetic.motion import render
from tests.shards import assign_shards, parse_shard

ON_DEVICE = re.compile(r"\bdevice: torch\.device\b|\bdevice\):|\bmark\.gpu\b")  # in a test's file

# Seconds per test on a GPU, fixtures included. A hanging GPU call cannot be interrupted: the test's process
# ends, and xdist starts another for the remaining tests.
LIMIT = 90
STDERR = pytest.StashKey[TextIO]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shard", metavar="NUMBER/TOTAL", help="run one part of the selected tests, such as 1/3"
    )
    parser.addoption(
        "--whole-files", action="store_true", help="with --shard: keep the tests of a file together"
    )
    parser.addoption(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="the device of tests marked on_device (%(default)s)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Without paths and -m, the same tests as `make test`.
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.markexpr:
        config.option.markexpr = "not soak"
    if config.getoption("--device") == "cpu":
        return
    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch finds no GPU")
    # cuBLAS reads it once, before the first product; deterministic tests need it.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        config.stash[STDERR] = os.fdopen(os.dup(2), "w")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --device cuda, import only files with tests on the device: others need more packages."""
    if config.getoption("--device") == "cpu" or not collection_path.match("test_*.py"):
        return None
    return True if ON_DEVICE.search(collection_path.read_text(encoding="utf-8")) is None else None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests that compute on --device, so that -m on_device selects them."""
    if "device" in getattr(item, "fixturenames", ()) or item.get_closest_marker("gpu"):
        item.add_marker("on_device")


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which may need a GPU
def pytest_runtest_setup(item: pytest.Item) -> None:
    on_gpu = item.config.getoption("--device") == "cuda"
    if item.get_closest_marker("gpu") and not on_gpu:
        pytest.skip("needs a GPU: pytest --device cuda")  # from one line, so that the summary has one line
    if on_gpu:  # instead of the longer limit of all tests
        faulthandler.dump_traceback_later(LIMIT, exit=True, file=item.config.stash[STDERR])


def pytest_runtest_logfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of --device: the CPU, or the first GPU, without TF32 as in a run."""
    if request.config.getoption("--device") == "cpu":
        return torch.device("cpu")
    from trainer.system.device import set_device, set_numerics

    gpu = torch.device("cuda", 0)
    set_device(gpu)
    set_numerics(deterministic=False)
    return gpu


LONGEST = (
    "integration/test_training.py",
    "trainer/tracking/test_mlflow_tracker.py",
    "trainer/tracking/test_killed.py",
    "pipelines/test_exactness.py",
    "trainer/cluster/test_preflight.py",
    "pipelines/test_decode_recovery.py",
    "trainer/checkpoint/test_checkpointer.py",
    "trainer/checkpoint/test_elastic.py",
    "trainer/checkpoint/test_resume.py",
    "pipelines/benchmark/test_benchmark.py",
    "integration/test_refusals.py",
    "models/test_batch_norm.py",
    "pipelines/test_autotune.py",
    "pipelines/test_loader.py",
)
"""The slowest files, which run first: at the end, one would leave the other processes idle."""


def run_order(item: pytest.Item) -> int:
    file = item.nodeid.partition("::")[0].removeprefix("tests/")
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


@pytest.hookimpl(trylast=True)  # after -m and -k: the selected tests are cut into parts
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=run_order)
    if (shard := config.getoption("--shard")) is None:
        if config.getoption("--whole-files"):
            raise pytest.UsageError("--whole-files goes with --shard")
        return
    try:
        number, total = parse_shard(shard)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    shards = assign_shards([item.nodeid for item in items], total, config.getoption("--whole-files"))
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
    """Read-only files, shared by all tests and processes of the session."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The processes' folders have a common parent: the first process renders, the others wait.
        root = tmp_path_factory.getbasetemp().parent / "motion"
        root.mkdir(exist_ok=True)
    else:
        root = tmp_path_factory.mktemp("motion")
    with open(root.with_name("motion.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "val.arrow").exists():
            render(root, train_clips=32, val_clips=16, seed=0)
    return MotionSet(root, root / "train.arrow", root / "val.arrow")
