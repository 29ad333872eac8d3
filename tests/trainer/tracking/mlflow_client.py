"""MLflow's client and a time limit for the tests of this folder."""

from typing import Any

TIMEOUT = 120.0  # seconds: a limit for machines under load, not an expectation


def client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def history(uri: str, run_id: str | None, key: str) -> list[tuple[int, float]]:
    """Step and value of each stored value of a metric."""
    return [(value.step, value.value) for value in client(uri).get_metric_history(run_id, key)]
