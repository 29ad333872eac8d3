"""Wrong responses of a server or of a proxy: each is an outage, and no record is lost."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainer.errors import RunError
from trainer.tracking.mlflow_tracker import MlflowTracker, deliver_outbox
from trainer.tracking.outbox import Outbox

SECRET = "s3cretpw"


class Proxy(ThreadingHTTPServer):
    """Answers every request alike, and keeps the headers of the last one."""

    status = 200
    body = b""
    authorization: str | None = None


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_GET(self) -> None:
        self.server.authorization = self.headers.get("Authorization")
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "token"),
    [
        (200, b"<html>Please log in</html>", "not in a valid JSON format"),
        (200, b"{}", "lacks the state"),
        (
            200,
            b'{"run": {}, "experiment": {"experiment_id": "1", "lifecycle_stage": "?"}}',
            "lacks the state",
        ),
        (401, b"<html>no</html>", "MLFLOW_TRACKING_PASSWORD"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "MLFLOW_TRACKING_PASSWORD"),
        (404, b"<html>nothing here</html>", "404"),
        (429, b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slowly"}', "429"),
        (500, b"<html>oops</html>", "500"),
        (503, b"", "503"),
    ],
)
def test_an_outage_keeps_every_record(
    tmp_path: Path,
    proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
    token: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("trainer.tracking.mlflow_tracker.Uploader", lambda *_: None)
    proxy.status, proxy.body = status, body
    uri = f"http://user:{SECRET}@127.0.0.1:{proxy.server_address[1]}"
    tracker = MlflowTracker(tmp_path, uri=uri, experiment="e", run_name="r")
    tracker.record_metrics(1, {"loss": 1.0})
    place = json.loads((tmp_path / "mlflow_run.json").read_text()) | {"run_id": "a" * 32}
    for run_id in (None, "a" * 32):
        (tmp_path / "mlflow_run.json").write_text(json.dumps(place | {"run_id": run_id}))
        with pytest.raises(RunError, match="2 lines are not uploaded") as caught:
            deliver_outbox(tmp_path)
        assert token in str(caught.value) and SECRET not in str(caught.value)
    assert Outbox(tmp_path).count_undelivered() == 2
    assert not (tmp_path / "mlflow.rejected.jsonl").exists()
    # The password still reaches the server.
    assert proxy.authorization == "Basic " + base64.b64encode(f"user:{SECRET}".encode()).decode()
