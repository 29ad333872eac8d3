"""What tests of several packages share."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.motion import render


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
    """Read only: every test of the session sees the same files."""
    root = tmp_path_factory.mktemp("motion")
    return MotionSet(root, *render(root, train_clips=32, val_clips=16, seed=0))
