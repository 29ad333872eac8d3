"""Deleted runs and experiments, repeated steps, values beyond MLflow's limits."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.tracking.mlflow_client import TIMEOUT, client, history
from trainer.errors import RunError
from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox, find_mlflow_run_id
from trainer.tracking.mlflow_upload import valid_key
from trainer.tracking.outbox import Outbox


def command_in(text: str, program: str) -> list[str]:
    """The command of a message that restores something, as a shell takes it apart."""
    words = shlex.split(text)
    (where,) = [number for number, word in enumerate(words) if word.endswith(program)][:1]
    return words[where - 1 : where + 5]


def test_records_for_a_deleted_run_wait_until_it_is_restored_or_go_to_a_new_one(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    first.record_params({"a": 1})
    first.record_metrics(1, {"loss": 3.0})
    assert first.close("KILLED", TIMEOUT) == 0
    run_id = find_mlflow_run_id(tmp_path)
    client(store).delete_run(run_id)
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    second = start(step=1)
    second.record_metrics(2, {"loss": 2.0})
    second.upload_artifact(picture)
    assert second.close("FINISHED", TIMEOUT) == 4
    logged = [record.getMessage() for record in caplog.records if "was deleted" in record.getMessage()]
    assert len(logged) == 1 and "--new-run" in logged[0] and "refuses a record" not in caplog.text
    where, _, *restore = command_in(logged[0], "mlflow")
    assert (where, restore) == (f"MLFLOW_TRACKING_URI={store}", ["runs", "restore", "--run-id", run_id])
    with pytest.raises(RunError, match="4 lines are not uploaded"):
        deliver_outbox(tmp_path)
    assert not (tmp_path / "mlflow.rejected.jsonl").exists()

    client(store).restore_run(run_id)
    assert deliver_outbox(tmp_path) == 4
    assert history(store, run_id, "loss") == [(1, 3.0), (2, 2.0)]
    assert client(store).get_run(run_id).info.status == "FINISHED"

    client(store).delete_run(run_id)
    assert deliver_outbox(tmp_path, new_run=True) == 8
    new = find_mlflow_run_id(tmp_path)
    assert new != run_id
    assert history(store, new, "loss") == [(1, 3.0), (2, 2.0)]
    assert client(store).get_run(new).data.params == {"a": "1"}
    third = start(step=2)
    third.record_metrics(3, {"loss": 1.0})
    assert third.close("FINISHED", TIMEOUT) == 0
    assert [step for step, _ in history(store, new, "loss")] == [1, 2, 3]


def test_no_file_is_uploaded_to_a_run_deleted_during_training(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker]
) -> None:
    tracker = start()
    deadline = time.monotonic() + TIMEOUT
    while Outbox(tmp_path).count_undelivered() and time.monotonic() < deadline:
        time.sleep(0.05)
    run_id = find_mlflow_run_id(tmp_path)
    client(store).delete_run(run_id)
    file = tmp_path / "file.txt"
    file.write_text("hello")
    tracker.upload_artifact(file)
    assert tracker.close("FINISHED", TIMEOUT) == 2
    client(store).restore_run(run_id)
    assert client(store).list_artifacts(run_id) == []
    assert deliver_outbox(tmp_path) == 2
    assert [stored.path for stored in client(store).list_artifacts(run_id)] == ["file.txt"]


def test_a_permanently_deleted_run_is_not_replaced_without_a_request(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], caplog: pytest.LogCaptureFixture
) -> None:
    first = start()
    first.record_metrics(1, {"loss": 3.0})
    assert first.close("KILLED", TIMEOUT) == 0
    place = tmp_path / "mlflow_run.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"run_id": "0" * 32}))
    assert start(step=1).close("FINISHED", TIMEOUT) == 2
    assert "deleted permanently" in caplog.text and "--new-run" in caplog.text
    assert deliver_outbox(tmp_path, new_run=True) == 5
    assert history(store, find_mlflow_run_id(tmp_path), "loss") == [(1, 3.0)]


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(
    tmp_path: Path,
    store: str,
    start: Callable[..., MlflowTracker],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert start().close("KILLED", TIMEOUT) == 0
    experiment = client(store).get_experiment_by_name(request.node.name)
    client(store).delete_experiment(experiment.experiment_id)
    second = start()
    second.record_metrics(1, {"loss": 1.0})
    assert second.close("FINISHED", TIMEOUT) == 3
    other = tmp_path / "other"
    other.mkdir()
    fresh = MlflowTracker(other, uri=store, experiment=request.node.name, run_name="b")
    assert fresh.close("FINISHED", TIMEOUT) == 2
    logged = [record.getMessage() for record in caplog.records if "was deleted" in record.getMessage()]
    restore = ["experiments", "restore", "--experiment-id", experiment.experiment_id]
    assert [command_in(text, "mlflow")[2:] for text in logged] == [restore, restore]
    client(store).restore_experiment(experiment.experiment_id)
    assert deliver_outbox(tmp_path) == 3
    assert deliver_outbox(other) == 2
    assert history(store, find_mlflow_run_id(tmp_path), "loss") == [(1, 1.0)]


def test_a_repeated_step_is_stored_once(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], caplog: pytest.LogCaptureFixture
) -> None:
    def attempt(after: int, values: dict[int, float]) -> None:
        tracker = start(step=after)
        for step, value in values.items():
            tracker.record_metrics(step, {"train/loss": value, "speed/clips_per_second": value * after})
        assert tracker.close("FAILED", TIMEOUT) == 0

    attempt(0, {10: 3.0, 20: 2.0, 30: 1.0})
    attempt(10, {20: 2.0, 30: 1.0, 40: 0.5})
    run_id = find_mlflow_run_id(tmp_path)
    once = [(10, 3.0), (20, 2.0), (30, 1.0), (40, 0.5)]
    assert history(store, run_id, "train/loss") == once
    assert [step for step, _ in history(store, run_id, "speed/clips_per_second")] == [10, 20, 30, 40]
    assert "was repeated" not in caplog.text
    # A process that dies after a call and before the offset is written.
    Outbox(tmp_path).mark_delivered(0)
    attempt(40, {40: 0.5, 50: 0.25})
    assert history(store, run_id, "train/loss") == [*once, (50, 0.25)]
    attempt(30, {40: 9.0, 50: 8.0, 60: 7.0})
    assert history(store, run_id, "train/loss") == [*once, (50, 0.25), (60, 7.0)]
    assert caplog.text.count("was repeated") == 1 and "--new-run" in caplog.text
    deliver_outbox(tmp_path, new_run=True)
    new = history(store, find_mlflow_run_id(tmp_path), "train/loss")
    assert sorted(new) == [(10, 3.0), (20, 2.0), (30, 1.0), (40, 9.0), (50, 8.0), (60, 7.0)]


def test_values_beyond_mlflow_s_limits_are_shortened_there_only(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], caplog: pytest.LogCaptureFixture
) -> None:
    long, key = "x" * 7000, "model.overrides." + "k" * 300
    tracker = start(run_name="r" * 300)
    tracker.record_params({"long": long, key: 1, "odd!key": 2, "a/../b": 3, "bytes": "name-\udcff", "z": 4})
    tracker.set_tags({"tag": "t" * 9000})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    run = client(store).get_run(find_mlflow_run_id(tmp_path))
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("(7000 characters)")
    assert len(run.data.tags["tag"]) == 8000 and len(run.info.run_name) == 250
    names = ("long", valid_key(key), valid_key("odd!key"), valid_key("a/../b"), "bytes", "z")
    assert set(run.data.params) == set(names) and len(valid_key(key)) == 250
    assert valid_key("odd!key") != valid_key("odd?key") != "odd_key"
    assert not (tmp_path / "mlflow.rejected.jsonl").exists()
    assert long in (tmp_path / "mlflow.jsonl").read_text()
    for name in ("'long'", "odd!key", "'tag'"):
        assert name in caplog.text
