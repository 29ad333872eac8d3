"""An S3 server on the loopback interface, in a process of its own, so that it can be stopped."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from pipelines.storage import object_store

BUCKET = "videos"
_SECRET = "wJalrXUtnFEMI-secret-of-the-test"


class S3Server:
    """Moto's server; `bucket` is made at each start, as its content is in memory."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                urlopen(f"{self.address}/moto-api/", timeout=5).close()
                break
            except (URLError, OSError):
                assert self._process.poll() is None
                time.sleep(0.1)
        self.store().mkdir(BUCKET)

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def store(self):  # type: ignore[no-untyped-def]
        """A client of the test."""
        import fsspec

        return fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A running server, whose address and keys are in the environment, as a user sets them."""
    s3fs = pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    # Clients keep the address of the server that an earlier module started.
    object_store._filesystem.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = S3Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", _SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server.start()
    try:
        yield server
    finally:
        server.stop()
