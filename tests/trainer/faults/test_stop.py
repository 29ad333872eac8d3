"""Real signals to real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from trainer.faults.stop import INTERRUPTED, REQUEUE, StopRequest

LOOP = """
import sys
from trainer.faults.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    for line in sys.stdin:
        print("stop" if stop.requested else "step", stop.requested, flush=True)
sys.exit(stop.exit_code)
"""


@contextmanager
def loop() -> Iterator[subprocess.Popen]:
    """A process that says after each line it is sent whether it was asked to stop."""
    command = [sys.executable, "-c", LOOP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert answer(process) == "ready"
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ask(process: subprocess.Popen) -> str:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


def leave(process: subprocess.Popen) -> int:
    assert process.stdin is not None
    process.stdin.close()
    return process.wait(60)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, INTERRUPTED)],
)
def test_the_first_signal_lets_the_process_finish(number: signal.Signals, code: int) -> None:
    with loop() as process:
        assert ask(process) == "step None"
        process.send_signal(number)
        assert ask(process) == f"stop {number.name}"
        assert leave(process) == code


def test_without_a_signal_the_process_leaves_with_zero() -> None:
    with loop() as process:
        assert ask(process) == "step None"
        assert leave(process) == 0


def test_a_second_interrupt_waits_for_nothing() -> None:
    with loop() as process:
        process.send_signal(signal.SIGINT)
        assert ask(process) == "stop SIGINT"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == INTERRUPTED


def test_an_impatient_person_beats_a_patient_scheduler() -> None:
    with loop() as process:
        process.send_signal(signal.SIGTERM)
        assert ask(process) == "stop SIGTERM"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        assert ask(process) == "stop SIGTERM"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == INTERRUPTED


def test_the_first_signal_names_the_reason() -> None:
    with loop() as process:
        process.send_signal(signal.SIGINT)
        assert ask(process) == "stop SIGINT"
        process.send_signal(signal.SIGTERM)  # what the deepspeed launcher sends after a Ctrl-C
        assert ask(process) == "stop SIGINT"
        assert leave(process) == INTERRUPTED


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    with pytest.raises(KeyError), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == "SIGUSR1"
        raise KeyError
    assert {number: signal.getsignal(number) for number in before} == before
