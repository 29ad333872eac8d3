"""Runs a command that saves its work when it is interrupted."""

import signal
import subprocess
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import IO


def run_child(command: Sequence[str], *, output: Path | None = None) -> int:
    """Run a command to its end. Returns its exit code, 128 + N where signal N ended it.

    output: a file to which its output and errors are appended; None leaves them where this process's go.

    Ctrl-C reaches the child through the terminal, SIGTERM and SIGUSR1 are passed on: the child decides when
    it ends, and this process waits for it.
    """
    with _opened(output) as file, subprocess.Popen(command, stdout=file, stderr=file) as child:

        def forward(number: int, _frame: FrameType | None) -> None:
            child.send_signal(number)

        handlers = {signal.SIGINT: lambda *_: None, signal.SIGTERM: forward, signal.SIGUSR1: forward}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _opened(path: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    return nullcontext() if path is None else path.open("ab")
