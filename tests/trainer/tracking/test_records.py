"""Records of data sets, logged models, machines and the run's duration."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.store.entities.paged_list import PagedList

from launch import deliver
from tests.trainer.tracking.mlflow_client import TIMEOUT, client
from trainer.tracking.logged_models import LoggedModels
from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox, find_mlflow_run_id
from trainer.tracking.outbox import Outbox


@pytest.fixture
def delivered(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> tuple[Any, Any, Any]:
    """A run of two checkpoints, the first of which is gone: MLflow's client, experiment and run."""
    tracker = start()
    profile = {"rows": 16, "classes": 8}
    for context in ("training", "validation"):
        manifest = tmp_path / "motion" / f"{context}.arrow"
        tracker.record_dataset(manifest, context, digest="ab" * 32, profile=profile)
    tracker.record_system_metrics({"system/cpu_utilization_percentage": 12.5})
    tracker.record_checkpoint(tmp_path / "step-0000010", 10, {"val/top1": 0.25})
    tracker.record_checkpoint(tmp_path / "step-0000020", 20, {})
    tracker.record_checkpoint(tmp_path / "step-0000020", 20, {"val/top1": 0.5, "val/loss": float("inf")})
    tracker.record_kept_checkpoints(["step-0000001", "step-0000020"])  # the first was never recorded
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"numbers")
    tracker.register_weights(
        tmp_path / "step-0000020", 20, {}, weights=weights, name=request.node.name, alias="best"
    )
    assert tracker.close("FINISHED", TIMEOUT, seconds=3600.0) == 0
    # A process that dies after the calls and before the offset is written.
    Outbox(tmp_path).mark_delivered(0)
    assert deliver_outbox(tmp_path) == 10
    mlflow = client(store)
    experiment = mlflow.get_experiment_by_name(request.node.name)
    (run,) = mlflow.search_runs([experiment.experiment_id])
    return mlflow, experiment, run


def test_all_models_but_the_kept_ones_are_deleted_however_many_there_are() -> None:
    names = [f"step-{number:07d}" for number in range(5)]
    deleted: list[str] = []

    class Pages:
        """MLflow's answers, two models to a page."""

        def search_logged_models(self, *_: Any, page_token: str | None = None, **__: Any) -> Any:
            first = int(page_token or 0)
            shown = names[first : first + 2]
            page = PagedList([SimpleNamespace(name=name, model_id=name) for name in shown], None)
            page.token = str(first + 2) if first + 2 < len(names) else None
            return page

        def delete_logged_model(self, model_id: str) -> None:
            deleted.append(model_id)

    LoggedModels(Pages(), "1", "2").delete_others({"names": [names[3]]})
    assert deleted == [*names[:3], names[4]]


def test_every_kind_of_record_arrives_once(
    tmp_path: Path, delivered: tuple[Any, Any, Any], request: pytest.FixtureRequest
) -> None:
    mlflow, experiment, run = delivered
    assert not (tmp_path / "mlflow.rejected.jsonl").exists()
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    found = {
        entry.tags[0].value: (entry.dataset.name, entry.dataset.digest, json.loads(entry.dataset.profile))
        for entry in run.inputs.dataset_inputs
    }
    assert found == {
        context: (f"motion/{context}.arrow", "ab" * 18, {"rows": 16, "classes": 8})
        for context in ("training", "validation")
    }
    assert run.info.end_time - run.info.start_time == 3_600_000
    assert run.data.metrics["system/cpu_utilization_percentage"] == 12.5

    (model,) = mlflow.search_logged_models(
        [experiment.experiment_id], filter_string="metrics.`val/top1` > 0.4"
    )
    assert (model.name, model.status, model.tags["step"]) == ("step-0000020", "READY", "20")
    assert model.tags["checkpoint"] == str(tmp_path / "step-0000020")
    assert {metric.key: metric.value for metric in model.metrics} == {"val/top1": 0.5}
    assert [known.name for known in mlflow.search_logged_models([experiment.experiment_id])] == [model.name]
    assert {output.step for output in run.outputs.model_outputs} >= {20}
    version = mlflow.get_model_version_by_alias(request.node.name, "best")
    assert (str(version.version), version.run_id) == ("1", run.info.run_id)
    assert [file.path for file in mlflow.list_logged_model_artifacts(model.model_id)] == [
        "weights.safetensors"
    ]


def test_another_address_gets_the_whole_history(
    tmp_path: Path,
    store: str,
    start: Callable[..., MlflowTracker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tracker = start()
    tracker.record_metrics(1, {"loss": 3.0})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    first = find_mlflow_run_id(tmp_path)
    there = f"{store}?timeout=30"  # another address, and no second database to be made

    def deliver_to(uri: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["deliver.py", str(tmp_path), "--uri", uri])
        return deliver.main(), "".join(capsys.readouterr())

    code, output = deliver_to("htp://host")
    assert (code, "--uri" in output) == (2, True)
    code, output = deliver_to(there)
    assert (code, "3 lines delivered" in output) == (0, True)
    moved = find_mlflow_run_id(tmp_path)
    assert moved is not None and moved != first
    assert client(there).get_run(moved).data.metrics == {"loss": 3.0}
    assert "0 lines delivered" in deliver_to(there)[1]
