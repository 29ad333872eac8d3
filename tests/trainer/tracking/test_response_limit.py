"""Endless responses of a server: reading stops at the limit."""

import socket
import threading
import zlib
from collections.abc import Iterator

import pytest

from trainer.tracking import response_limit
from trainer.tracking.response_limit import limit_replies

LIMIT = 2**20
BLOCK = b"x" * 2**16
READ_AHEAD = 8 * 2**20  # bytes that lie in the sockets' buffers when the reader has stopped


class EndlessServer:
    """Sends a head, and then one block again and again, and counts the bytes."""

    def __init__(self) -> None:
        self.head = b""
        self.block = b""
        self.sent = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            connection.recv(2**16)
            try:
                connection.sendall(self.head)
                while self.block:
                    connection.sendall(self.block)
                    self.sent += len(self.block)
            except OSError:  # the reader has gone, as it should
                return

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def server() -> Iterator[EndlessServer]:
    server = EndlessServer()
    yield server
    server.close()


def compressed(size: int) -> bytes:
    packer = zlib.compressobj(wbits=31)
    return packer.compress(bytes(size)) + packer.flush()


BOMB = compressed(16 * LIMIT)


@pytest.mark.parametrize(
    ("head", "block"),
    [
        pytest.param(b"HTTP/1.1 200 OK\r\n\r\n", BLOCK, id="no length"),
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Length: 20000000000\r\n\r\n", BLOCK, id="20 GB"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"10000\r\n" + BLOCK + b"\r\n",
            id="in parts",
        ),
        pytest.param(b"HTTP/1.1 500 Oops\r\n\r\n", BLOCK, id="an error"),
        pytest.param(b"HTTP/1.1 302 There\r\nLocation: /\r\n\r\n", BLOCK, id="a redirect"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(BOMB) + BOMB,
            b"",
            id="compressed",
        ),
    ],
)
def test_reading_an_endless_response_stops(
    server: EndlessServer, monkeypatch: pytest.MonkeyPatch, head: bytes, block: bytes
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    monkeypatch.setattr(response_limit, "LONGEST_REPLY", LIMIT)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    # MLflow keeps a session for each set of options: one that this process has not used before.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "7")
    limit_replies()
    server.head, server.block = head, block
    with pytest.raises(MlflowException) as caught:
        MlflowClient(server.address).get_run("a" * 32)
    replies = 31 if b"302" in head else 1
    assert server.sent <= replies * (LIMIT + READ_AHEAD)
    if b" 200 " in head:
        assert "longer than 1 MiB" in str(caught.value)
