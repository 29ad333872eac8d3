"""A lost, duplicate or late request to create a run leaves one run in MLflow."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox

Create = Callable[..., Any]


def lost_reply(create: Create, late: list[Callable[[], Any]]) -> Create:
    """The first request is executed, and its response is lost."""
    calls: list[int] = []

    def request(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        calls.append(1)
        made = create(client, *arguments, **named)
        if len(calls) == 1:
            raise ConnectionError("the reply is lost")
        return made

    return request


def doubled(create: Create, late: list[Callable[[], Any]]) -> Create:
    """Each request is executed twice, as if a lower layer retried."""

    def request(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        create(client, *arguments, **named)
        return create(client, *arguments, **named)

    return request


def delayed(create: Create, late: list[Callable[[], Any]]) -> Create:
    """The first request is executed when the run is nearly over."""

    def request(client: MlflowClient, *arguments: Any, **named: Any) -> Any:
        if not late:
            late.append(lambda: create(client, *arguments, **named))
            raise TimeoutError("no reply")
        return create(client, *arguments, **named)

    return request


@pytest.mark.parametrize("fault", [lost_reply, doubled, delayed])
def test_a_faulty_request_leaves_one_run(
    start: Callable[..., MlflowTracker],
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: Any,
) -> None:
    late: list[Callable[[], Any]] = []
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    monkeypatch.setattr(MlflowClient, "create_run", fault(MlflowClient.create_run, late))
    tracker = start(experiment=fault.__name__)
    tracker.record_params({"a": 1})
    tracker.record_metrics(1, {"loss": 1.0})
    for _ in range(2):
        try:
            deliver_outbox(tmp_path)
            break
        except Exception as error:
            assert "reply" in str(error)
    for request in late:
        request()
    tracker.record_metrics(2, {"loss": 0.5})
    tracker._append({"kind": "status", "status": "FINISHED"})
    deliver_outbox(tmp_path)
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(fault.__name__)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params == {"a": "1"}
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    every = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL)
    assert len(every) == (1 if fault is lost_reply else 2)
