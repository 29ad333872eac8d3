"""A real server process for tests."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE = 120.0  # seconds


@dataclass
class Serving:
    """A running `launch/serve.py`.

    process: the server.
    port: it listens on.
    temporary: its folder for temporary files.
    """

    process: subprocess.Popen[str]
    port: int
    temporary: Path

    @property
    def uploads(self) -> list[Path]:
        return [path for folder in self.temporary.glob("uploads-*") for path in folder.iterdir()]

    def send(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON of a response."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def wait_for_deleted_uploads(self) -> None:
        deadline = time.monotonic() + 20
        while self.uploads:
            assert time.monotonic() < deadline, self.uploads
            time.sleep(0.05)


@contextmanager
def serving(*arguments: object, temporary: Path) -> Iterator[Serving]:
    """Start a server on a free port; kill it at the end if it still runs."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), *map(str, arguments), "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if found := re.search(r"http://\S+:(\d+)/", line):
                    yield Serving(process, int(found[1]), temporary)
                    break
            else:
                errors.seek(0)
                raise AssertionError(errors.read())
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait(30)
            process.stdout.close()
