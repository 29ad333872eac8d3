"""A process that hangs, crashes or cannot begin."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from trainer import RunError
from trainer.inference.inference_process import CrashedError, InferenceProcess, TimedOutError


def prepared() -> tuple[str, Callable[[str], Any]]:
    return "ready", work


def work(what: str) -> Any:
    match what:
        case "hang":
            time.sleep(600)
        case "crash":
            os._exit(3)
        case "raise":
            raise ValueError("on purpose")
    return os.getpid()


def refused() -> tuple[str, Callable[[str], Any]]:
    raise RunError("no such model")


def test_a_process_that_hangs_or_crashes_is_replaced() -> None:
    process = InferenceProcess(prepared)
    assert process.start() == "ready"
    first = process.ask("", 60)
    with pytest.raises(TimedOutError):
        process.ask("hang", 0.3)
    second = process.ask("", 60)
    with pytest.raises(CrashedError):
        process.ask("crash", 60)
    with pytest.raises(RunError, match="on purpose"):
        process.ask("raise", 60)
    third = process.ask("", 60)
    assert third == process.ask("", 60) and len({first, second, third}) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    threading.Timer(0.5, process.close).start()
    with pytest.raises(RunError):
        process.ask("hang", 60)
    with pytest.raises(ProcessLookupError):
        os.kill(third, 0)


def test_a_model_that_cannot_be_loaded_is_told() -> None:
    process = InferenceProcess(refused)
    with pytest.raises(RunError, match="no such model"):
        process.start()
    process.close()
