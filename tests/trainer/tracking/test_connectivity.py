"""Contacting the server before training: wrong servers are refused, servers that are down are not."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trainer.errors import RunError
from trainer.secrets import Address
from trainer.tracking.address import check_reachable


class _Handler(BaseHTTPRequestHandler):
    """MLflow below /mlflow, and below /private, where a login is wanted; another server elsewhere."""

    def do_GET(self) -> None:
        status = {"/mlflow/health": 200, "/private/health": 401}.get(self.path, 404)
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("path", ["/mlflow", "/private/"])
def test_mlflow_and_a_login_page_are_accepted(server: str, path: str) -> None:
    check_reachable(Address(server + path), "tracking.uri")


def test_a_server_that_is_down_is_accepted(tmp_path: Path) -> None:
    check_reachable(Address("http://127.0.0.1:9"), "tracking.uri")
    check_reachable(Address(f"sqlite:///{tmp_path}/new/mlflow.db"), "tracking.uri")


def test_another_server_is_refused(server: str) -> None:
    with pytest.raises(RunError, match="/health"):
        check_reachable(Address(server), "tracking.uri")


def test_an_unknown_host_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RunError, match=r"nowhere\.invalid"):
        check_reachable(Address("http://nowhere.invalid:5000"), "tracking.uri")


def test_a_database_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, _: path != tmp_path)  # root may write everywhere
    with pytest.raises(RunError, match=str(tmp_path)):
        check_reachable(Address(f"sqlite:///{tmp_path}/mlflow.db"), "tracking.uri")
