"""Credentials of an address: MLflow receives them, and no file or message of a run has them."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import RunError
from trainer.secrets import Address, with_credentials
from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox
from trainer.tracking.outbox import Outbox

SECRET = "s3cretpw"


def test_no_file_and_no_message_of_a_run_has_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "before")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:{SECRET}@127.0.0.1:9")
    tracker = MlflowTracker(tmp_path, uri=None, experiment="e", run_name="r")
    tracker.record_params({"command": f"--set tracking.uri=http://user:{SECRET}@127.0.0.1:9"})
    assert tracker.close("KILLED", 0.0) == 3
    tracker._uploader._thread.join(60)  # type: ignore[union-attr]
    assert tracker.how_to_see() == "http://127.0.0.1:9"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == (
        "user",
        SECRET,
    )
    for file in tmp_path.iterdir():
        assert SECRET not in file.read_text(), file
    assert SECRET not in caplog.text


def test_a_password_in_the_reference_of_an_earlier_version_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., MlflowTracker]
) -> None:
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    old = {"uri": f"postgresql://user:{SECRET}@h/db", "experiment": "e", "run_name": "r", "started": 1}
    (tmp_path / "mlflow_run.json").write_text(json.dumps(old | {"key": "k", "run_id": "abc"}))
    MlflowTracker(tmp_path, uri=None, experiment="e", run_name="r")
    kept = json.loads((tmp_path / "mlflow_run.json").read_text())
    assert (kept["uri"], kept["run_id"], kept["credentials"]) == ("postgresql://h/db", "abc", True)


def test_a_database_s_password_comes_from_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = Address(f"postgresql://user:{SECRET}@h/db")
    assert (
        with_credentials(Address("postgresql://h/db"), {"MLFLOW_TRACKING_URI": address.full}).full
        == address.full
    )
    assert not with_credentials(
        Address("postgresql://other/db"), {"MLFLOW_TRACKING_URI": address.full}
    ).has_credentials
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    MlflowTracker(tmp_path, uri=address, experiment="e", run_name="r")
    with pytest.raises(RunError, match="MLFLOW_TRACKING_URI"):
        deliver_outbox(tmp_path)
    assert Outbox(tmp_path).count_undelivered() == 1
