"""The tracker with a real SQLite store, and with a server process that is killed and restarted."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from launch import deliver
from tests.trainer.tracking.mlflow_client import TIMEOUT, client
from trainer.errors import RunError
from trainer.tracking import uploader
from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox
from trainer.tracking.outbox import Outbox

ROOT = Path(__file__).parents[3]


def runs(uri: str, experiment: str) -> list[Any]:
    mlflow = client(uri)
    return list(mlflow.search_runs([mlflow.get_experiment_by_name(experiment).experiment_id]))


def rejected(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "mlflow.rejected.jsonl").read_text().splitlines()]


def test_everything_arrives_with_the_times_of_the_calls(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    tracker = start()
    tracker.record_params({f"section.field{i}": i for i in range(130)} | {"none": None})
    tracker.set_tags({"commit": "abc"})
    for step in range(600):
        tracker.record_metrics(step, {"loss": 1 / (step + 1), "train/rate": step})
    tracker.record_metrics(600, {"odd": float("nan")})
    tracker.record_metrics(601, {"odd": float("inf")})
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    tracker.upload_artifact(picture, "evaluation")
    assert tracker.close("FINISHED", TIMEOUT) == 0

    (run,) = runs(store, request.node.name)
    mlflow = client(store)
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert len(run.data.params) == 131
    assert (run.data.params["section.field129"], run.data.params["none"]) == ("129", "None")
    assert run.data.tags["commit"] == "abc"
    history = mlflow.get_metric_history(run.info.run_id, "loss")
    recorded = [
        (line["step"], line["values"]["loss"], line["time"])
        for line in map(json.loads, (tmp_path / "mlflow.jsonl").read_text().splitlines())
        if line["kind"] == "metrics" and "loss" in line["values"]
    ]
    assert [(value.step, value.value, value.timestamp) for value in history] == recorded
    assert len(recorded) == 600
    (odd,) = mlflow.get_metric_history(run.info.run_id, "odd")
    assert odd.value != odd.value
    assert run.data.metrics["odd_infinite"] == 1.0
    (stored,) = Path(store.removeprefix("sqlite:///")).parent.glob("mlartifacts/*/artifacts/evaluation/*")
    assert stored.read_text() == "pixels"


def test_a_restart_continues_the_same_run(
    store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    first = start()
    first.record_metrics(1, {"loss": 3.0})
    assert first.close("KILLED", TIMEOUT) == 0
    (run,) = runs(store, request.node.name)
    assert run.info.status == "KILLED"
    second = start()
    second.record_metrics(2, {"loss": 2.0})
    assert second.close("FINISHED", TIMEOUT) == 0
    (same,) = runs(store, request.node.name)
    assert (same.info.run_id, same.info.status) == (run.info.run_id, "FINISHED")
    assert [v.step for v in client(store).get_metric_history(run.info.run_id, "loss")] == [1, 2]


def test_a_refused_value_delays_nothing(
    tmp_path: Path,
    store: str,
    start: Callable[..., MlflowTracker],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tracker = start()
    tracker.record_params({"kept": 1})
    tracker.set_tags({"between": "so that the two sets of parameters go in two calls"})
    assert tracker.close("KILLED", TIMEOUT) == 0
    tracker = start()
    tracker.record_params({"kept": 2, "new": 3, "later": 4})
    tracker.record_metrics(1, {"good": 1.0, "bad!": 2.0, "fine": 3.0})
    tracker.upload_artifact(tmp_path / "nowhere.txt")
    tracker.record_metrics(2, {"good": 5.0})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    (run,) = runs(store, request.node.name)
    assert run.data.params == {"kept": "1", "new": "3", "later": "4"}
    assert run.data.metrics == {"good": 5.0, "fine": 3.0}
    reasons = {record.get("key", record.get("path")): record["reason"] for record in rejected(tmp_path)}
    assert reasons.keys() == {"kept", "bad!", str(tmp_path / "nowhere.txt")}
    assert "Changing param values is not allowed" in reasons["kept"]
    assert sum("refuses a record" in record.getMessage() for record in caplog.records) == 3


def test_uploading_twice_stores_once(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    tracker = start()
    tracker.record_metrics(1, {"loss": 3.0})
    tracker.record_metrics(2, {"loss": float("nan")})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    # A process that dies after the call and before the offset is written.
    Outbox(tmp_path).mark_delivered(0)
    assert deliver_outbox(tmp_path) == 4
    (run,) = runs(store, request.node.name)
    assert len(client(store).get_metric_history(run.info.run_id, "loss")) == 2


def test_a_run_whose_creation_was_interrupted_is_found_again(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    assert start().close("KILLED", TIMEOUT) == 0
    place = tmp_path / "mlflow_run.json"
    known = json.loads(place.read_text())
    place.write_text(json.dumps(known | {"run_id": None}))
    assert start().close("FINISHED", TIMEOUT) == 0
    (run,) = runs(store, request.node.name)
    assert run.info.run_id == known["run_id"] == json.loads(place.read_text())["run_id"]


def test_a_line_left_incomplete_by_a_crash_is_rejected(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    assert start().close("KILLED", TIMEOUT) == 0
    with (tmp_path / "mlflow.jsonl").open("a") as file:
        file.write('{"kind": "metrics", "step": 1, "val')
    tracker = start()
    tracker.record_metrics(2, {"loss": 2.0})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    (run,) = runs(store, request.node.name)
    assert run.data.metrics == {"loss": 2.0}
    (torn,) = rejected(tmp_path)
    assert torn["line"] == '{"kind": "metrics", "step": 1, "val\n'


def test_another_experiment_gets_the_whole_history(
    store: str, start: Callable[..., MlflowTracker], request: pytest.FixtureRequest
) -> None:
    tracker = start()
    tracker.record_metrics(1, {"loss": 3.0})
    assert tracker.close("KILLED", TIMEOUT) == 0
    moved = start(experiment="elsewhere")
    moved.record_metrics(2, {"loss": 2.0})
    assert moved.close("FINISHED", TIMEOUT) == 0
    (run,) = runs(store, "elsewhere")
    assert [v.step for v in client(store).get_metric_history(run.info.run_id, "loss")] == [1, 2]


def test_without_an_address_the_run_keeps_its_own(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert start().close("KILLED", TIMEOUT) == 0
    before = (tmp_path / "mlflow_run.json").read_text()
    assert start(uri=None).close("FINISHED", TIMEOUT) == 0
    assert (tmp_path / "mlflow_run.json").read_text() == before


def test_the_address_of_the_environment_and_the_command_to_view_the_run(
    tmp_path: Path, start: Callable[..., MlflowTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploader, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.chdir(tmp_path)
    remote = start(uri=None)
    assert remote.how_to_see() == "http://127.0.0.1:9"
    remote.close("KILLED", timeout=0)
    assert remote._uploader is not None
    remote._uploader._thread.join(TIMEOUT)  # or it would upload the records of the next tracker
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    command = start(uri=None).how_to_see()
    assert command is not None
    program, *arguments = command.split()
    assert arguments == ["ui", "--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    assert shutil.which(program)


def test_a_full_disk_stops_nothing(
    start: Callable[..., MlflowTracker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    tracker = start()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Outbox, "append", full)
    tracker.record_metrics(1, {"loss": 1.0})
    tracker.record_metrics(2, {"loss": 1.0})
    # The uploader thread of an earlier test may still log.
    own = [text for record in caplog.records if "No space left" in (text := record.getMessage())]
    assert [text.endswith("records are lost") for text in own] == [True]


def test_disabled_does_nothing(tmp_path: Path, start: Callable[..., MlflowTracker]) -> None:
    tracker = start(enabled=False)
    tracker.record_params({"a": 1})
    tracker.record_metrics(1, {"loss": 1.0})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    assert tracker.how_to_see() is None
    assert list(tmp_path.iterdir()) == []


def test_the_tracker_does_not_import_mlflow() -> None:
    modules = "trainer.tracking.mlflow_tracker, trainer.tracking.training_tracker"
    code = f"import sys, {modules}; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_deliver_command_needs_a_tracked_run_and_the_lock(
    tmp_path: Path,
    start: Callable[..., MlflowTracker],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def expect(run_dir: Path, code: int, token: str) -> None:
        monkeypatch.setattr(sys, "argv", ["deliver.py", str(run_dir)])
        assert deliver.main() == code
        assert token in "".join(capsys.readouterr())

    expect(tmp_path, 2, "mlflow_run.json")
    expect(tmp_path / "nowhere", 2, "mlflow_run.json")
    assert start().close("FINISHED", TIMEOUT) == 0
    with Outbox(tmp_path).delivery_lock():
        expect(tmp_path, 85, "another process")
    expect(tmp_path, 0, "0 lines delivered")
    place = json.loads((tmp_path / "mlflow_run.json").read_text())
    (tmp_path / "mlflow_run.json").write_text(json.dumps(place | {"uri": "http://127.0.0.1:9"}))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    Outbox(tmp_path).mark_delivered(0)
    expect(tmp_path, 85, "2 lines are not uploaded")
    (tmp_path / "mlflow_run.json").write_text(json.dumps(place | {"uri": "htp://host"}))
    expect(tmp_path, 2, "did you mean http://host")


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """An MLflow server on loopback, killed without notice at the end."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "server.log").open("a") as log:
        process = subprocess.Popen(
            [*command, *stores],
            stdout=log,
            stderr=log,
            start_new_session=True,  # its workers are killed with it
            env=os.environ
            | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"{address} does not answer")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def close_during_an_outage(
    tracker: MlflowTracker, run_dir: Path, left: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The tracker warns, keeps its lines, and the deliver command fails."""
    assert tracker.close("KILLED", timeout=1.0) == left
    assert tracker._uploader is not None
    tracker._uploader._thread.join(TIMEOUT)
    assert "waiting up to 1 s" in caplog.text and "uniformerv2 deliver" in caplog.text
    with pytest.raises(RunError, match=f"{left} lines are not uploaded"):
        deliver_outbox(run_dir)


def test_a_missing_server_costs_a_warning_only(
    tmp_path: Path,
    store: str,
    start: Callable[..., MlflowTracker],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The lines go to another store here; a soak test starts the server itself later."""
    monkeypatch.setattr(uploader, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(uploader, "SILENT", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = start(uri=f"http://127.0.0.1:{free_port()}")
    tracker.record_metrics(1, {"loss": 3.0})
    deadline = time.monotonic() + TIMEOUT  # MLflow is imported first
    while "upload to MLflow fails" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    close_during_an_outage(tracker, tmp_path, 3, caplog)
    tracker = start()
    tracker.record_metrics(2, {"loss": 1.0})
    assert tracker.close("FINISHED", TIMEOUT) == 0
    (run,) = runs(store, request.node.name)
    assert run.info.status == "FINISHED"
    assert [v.step for v in client(store).get_metric_history(run.info.run_id, "loss")] == [1, 2]


@pytest.mark.soak
@pytest.mark.parametrize("killed", [pytest.param(False, id="not started"), pytest.param(True, id="killed")])
def test_a_server_that_returns_gets_every_record(
    killed: bool,
    tmp_path: Path,
    start: Callable[..., MlflowTracker],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(uploader, "LONGEST_PAUSE", 0.1)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    picture = tmp_path / "picture.txt"
    picture.write_text("pixels")
    with server(tmp_path, port) if killed else nullcontext():
        tracker = start(uri=uri)
        tracker.record_metrics(1, {"loss": 3.0})
        deadline = time.monotonic() + TIMEOUT
        while killed and Outbox(tmp_path).count_undelivered() and time.monotonic() < deadline:
            time.sleep(0.05)
        delivered = 2 if killed else 0
        assert Outbox(tmp_path).count_undelivered() == 2 - delivered
    tracker.record_metrics(2, {"loss": 2.0})
    tracker.upload_artifact(picture)
    left = 5 - delivered
    monkeypatch.setattr(uploader, "SILENT", 0.1)
    close_during_an_outage(tracker, tmp_path, left, caplog)

    with server(tmp_path, port):
        by_hand = [sys.executable, str(ROOT / "launch" / "deliver.py"), str(tmp_path)]
        result = subprocess.run(by_hand, capture_output=True, text=True, check=True, cwd=ROOT)
        assert result.stdout == f"{left} lines delivered from {tmp_path}\n"
        tracker = start(uri=uri)
        tracker.record_metrics(3, {"loss": 1.0})
        assert tracker.close("FINISHED", TIMEOUT) == 0
        (run,) = runs(uri, request.node.name)
        assert run.info.status == "FINISHED"
        mlflow = client(uri)
        assert [v.step for v in mlflow.get_metric_history(run.info.run_id, "loss")] == [1, 2, 3]
        assert [file.path for file in mlflow.list_artifacts(run.info.run_id)] == ["picture.txt"]
        page = f"{uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
        assert tracker.how_to_see() == f"{page}?workflowType=machine_learning"


def test_a_copy_of_a_run_is_another_run_and_one_that_was_moved_is_not(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    def key(run_dir: Path) -> str:
        tracker = MlflowTracker(run_dir, uri=store, experiment=request.node.name, run_name="a")
        assert tracker.close("FINISHED", TIMEOUT) == 0
        found: str = json.loads((run_dir / "mlflow_run.json").read_text())["key"]
        return found

    first, copy, moved = (tmp_path / name for name in ("first", "copy", "moved"))
    first.mkdir()
    own = key(first)
    shutil.copytree(first, copy)
    assert key(copy) != own and key(first) == own
    first.rename(moved)
    assert key(moved) == own
