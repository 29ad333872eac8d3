"""A real MLflow store for the tests of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trainer.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests here: making its tables takes seconds. Each has its own experiment."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def start(tmp_path: Path, store: str, request: pytest.FixtureRequest) -> Callable[..., MlflowTracker]:
    """Start a tracker on the test's run directory."""

    def tracker(**changes: Any) -> MlflowTracker:
        arguments = {"uri": store, "experiment": request.node.name, "run_name": "a run"} | changes
        return MlflowTracker(tmp_path, **arguments)

    return tracker
