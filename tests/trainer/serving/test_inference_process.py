"""A process that hangs, crashes or cannot start."""

import os
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import RunError
from trainer.serving.inference_process import CrashedError, InferenceProcess, TimedOutError


def prepared() -> tuple[str, Callable[[str], Any]]:
    return "ready", work


def work(request: str) -> Any:
    match request:
        case "hang":
            time.sleep(600)
        case "crash":
            os._exit(3)
        case "raise":
            raise ValueError("on purpose")
    return os.getpid()


def refused() -> tuple[str, Callable[[str], Any]]:
    raise RunError("no such model")


def refused_by_its_path() -> tuple[str, Callable[[str], Any]]:
    Path("x" * 300).stat()
    raise AssertionError


def test_a_process_that_hangs_or_crashes_is_replaced() -> None:
    process = InferenceProcess(prepared)
    assert process.start() == "ready"
    first = process.call("", 60)
    with pytest.raises(TimedOutError):
        process.call("hang", 0.3)
    second = process.call("", 60)
    with pytest.raises(CrashedError):
        process.call("crash", 60)
    with pytest.raises(RunError, match="on purpose"):
        process.call("raise", 60)
    third = process.call("", 60)
    assert third == process.call("", 60) and len({first, second, third}) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    threading.Timer(0.5, process.close).start()
    with pytest.raises(RunError, match="closed"):
        process.call("hang", 60)
    with pytest.raises(RunError, match="closed"):
        process.call("", 60)
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)


def test_the_pipe_is_closed_once_by_close_and_a_running_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both close it otherwise, and its number may be that of another file by then."""
    process = InferenceProcess(prepared)
    process.start()
    closed = []
    close = Connection._close  # type: ignore[attr-defined]

    def close_slowly(self: Connection) -> None:
        closed.append(self.fileno())
        time.sleep(0.5)
        close(self)

    monkeypatch.setattr(Connection, "_close", close_slowly)
    closing = threading.Timer(0.5, process.close)
    closing.start()
    with pytest.raises(RunError, match="closed"):
        process.call("hang", 60)
    closing.join()
    assert len(closed) == 1


class CrashesTheSecondTime:
    """A model whose second loading kills its process, as if memory were short, and whose third is slow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self) -> tuple[str, Callable[[str], Any]]:
        times = len(list(self._folder.iterdir()))
        (self._folder / str(times)).touch()
        if times == 1:
            os._exit(9)
        time.sleep(times)
        return "ready", work


def test_a_model_that_could_not_be_loaded_again_is_loaded_once_more(tmp_path: Path) -> None:
    process = InferenceProcess(CrashesTheSecondTime(tmp_path))
    process.start()
    with pytest.raises(CrashedError):
        process.call("crash", 60)
    with pytest.raises(RunError, match="memory"):
        process.call("", 60)
    with pytest.raises(TimedOutError, match="not loaded"):
        process.call("", 0.1)
    assert process.call("", 60) > 0  # loading continued after the timeout
    assert len(list(tmp_path.iterdir())) == 3
    process.close()
    with pytest.raises(RunError):
        process.call("", 60)


class LoadsOnce:
    """A model whose second loading does not end."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __call__(self) -> tuple[str, Callable[[str], Any]]:
        if self._file.exists():
            time.sleep(600)
        self._file.touch()
        return "ready", work


def test_a_process_that_is_closed_while_it_loads_again_says_so(tmp_path: Path) -> None:
    process = InferenceProcess(LoadsOnce(tmp_path / "loaded"))
    process.start()
    with pytest.raises(CrashedError):
        process.call("crash", 60)
    threading.Timer(0.2, process.close).start()
    with pytest.raises(RunError, match="closed"):
        process.call("", 60)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [(refused, "no such model"), (refused_by_its_path, "x{300}: File name too long; ")],
)
def test_a_model_that_cannot_be_loaded_is_an_error(prepare: Callable[[], Any], message: str) -> None:
    process = InferenceProcess(prepare)
    with pytest.raises(RunError, match=f"^{message}"):
        process.start()
    process.close()
