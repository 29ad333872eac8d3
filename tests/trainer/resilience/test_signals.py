"""Real signals to real processes."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

import trainer.resilience.signals as stop_module
from trainer.resilience.signals import INTERRUPTED, REQUEUE, STOP_FILE, TIME_LIMIT, StopRequest, exit_code

PATIENCE = 60.0  # seconds

LOOP = """
import sys
from pathlib import Path
from trainer.resilience.signals import StopRequest, exit_code
with StopRequest({arguments}) as stop:
    print("ready", flush=True)
    for line in sys.stdin:
        print("stop" if stop.poll() else "step", stop.poll(), flush=True)
sys.exit(exit_code({{stop.poll()}} - {{None}}))
"""


@pytest.fixture(autouse=True)
def nothing_ignored() -> Iterator[None]:
    """What started the tests may have some signals ignored, as nohup does, and processes inherit that."""
    ignored = [n for n in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(n) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def loop(arguments: str = "", *before: str, **more: Any) -> Iterator[subprocess.Popen]:
    """A process that says after each line it is sent whether it was asked to stop."""
    command = [*before, sys.executable, "-c", LOOP.format(arguments=arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, **more) as process:
        try:
            assert answer(process) == "ready"
            yield process
        finally:
            process.kill()


def answer(process: subprocess.Popen) -> str:
    """The next line; a process answers a line at a time, when it was asked."""
    assert process.stdout is not None
    await_word(process.stdout.fileno())
    return process.stdout.readline().strip()


def await_word(descriptor: int) -> None:
    ready, _, _ = select.select([descriptor], [], [], PATIENCE)
    assert ready, "nothing was said"


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


LISTENED_TO = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def test_handlers_are_put_back() -> None:
    before = {number: signal.getsignal(number) for number in LISTENED_TO}
    with pytest.raises(KeyError), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.poll() == "SIGUSR1"
        raise KeyError
    assert {number: signal.getsignal(number) for number in before} == before


GONE_TERMINAL = """
import fcntl
import sys
import termios
import time
if {terminal}:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from trainer.resilience.signals import StopRequest, exit_code
with StopRequest() as stop, open({notes!r}, "w") as notes:
    print("ready", flush=True)
    while stop.poll() is None:
        time.sleep(0.01)
    print("a step more", flush=True)
    print("a step more", file=sys.stderr, flush=True)
    notes.write("saved")
sys.exit(exit_code([stop.poll()]))
"""


def on_terminal(notes: Path, output: int | None) -> tuple[int, subprocess.Popen]:
    """A process on a terminal of its own, and the terminal's other end; None writes its output there too."""
    keyboard, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", GONE_TERMINAL.format(notes=str(notes), terminal=True)],
        stdin=terminal,
        stdout=terminal if output is None else output,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    return keyboard, process


def test_a_closed_terminal_lets_the_process_save(tmp_path: Path) -> None:
    keyboard, process = on_terminal(tmp_path / "notes", None)
    await_word(keyboard)
    assert os.read(keyboard, 5) == b"ready"
    os.close(keyboard)  # the kernel sends SIGHUP
    assert process.wait(60) == INTERRUPTED
    assert (tmp_path / "notes").read_text() == "saved"


def test_what_goes_to_a_file_survives_the_terminal(tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as log:
        keyboard, process = on_terminal(tmp_path / "notes", log.fileno())
    deadline = time.monotonic() + PATIENCE
    while (tmp_path / "log").read_text() != "ready\n" and time.monotonic() < deadline:
        time.sleep(0.01)
    os.close(keyboard)
    assert process.wait(60) == INTERRUPTED
    assert (tmp_path / "log").read_text() == "ready\na step more\n"


def test_nohup_is_respected() -> None:
    with loop("", "nohup", stderr=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGHUP)
        assert ask(process) == "step None"
        process.send_signal(signal.SIGTERM)
        assert ask(process) == "stop SIGTERM"


def test_a_reader_that_ends_by_the_same_interrupt_does_no_harm(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GONE_TERMINAL.format(notes=str(tmp_path / "notes"), terminal=False)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    await_word(process.stdout.fileno())
    assert process.stdout.readline() == b"ready\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == INTERRUPTED
    assert (tmp_path / "notes").read_text() == "saved"


def test_a_reader_that_ends_after_the_interrupt_does_no_harm() -> None:
    with loop() as process:
        process.send_signal(signal.SIGINT)
        assert ask(process) == "stop SIGINT"
        assert process.stdout is not None
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write("\n")
        assert leave(process) == INTERRUPTED


def test_nothing_goes_into_a_pipe_once_the_terminal_is_closed() -> None:
    with loop("announce=False", stderr=subprocess.DEVNULL) as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdin is not None
        process.stdin.write("\n")
        assert leave(process) == INTERRUPTED
        assert answer(process) == "", "its reader may close at any moment"


def test_a_file_asks_once(tmp_path: Path) -> None:
    file = tmp_path / "STOP"
    file.touch()
    stop = StopRequest(stop_file=file)
    assert stop.poll() == STOP_FILE == "the file STOP"
    assert not file.exists()
    assert stop.poll() == STOP_FILE
    assert StopRequest(stop_file=file).poll() is None


def test_a_file_that_comes_later_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopRequest(stop_file=tmp_path / "STOP")
    assert stop.poll() is None
    (tmp_path / "STOP").touch()
    assert stop.poll() is None, "the filesystem was asked again at once"
    monkeypatch.setattr(stop_module, "_POLL_EVERY", 0.0)
    assert stop.poll() == STOP_FILE


def test_a_file_that_cannot_be_removed_is_heard_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "STOP").mkdir()  # not to be unlinked, whoever runs this
    assert StopRequest(stop_file=tmp_path / "STOP").poll() == STOP_FILE
    assert f"{tmp_path / 'STOP'} cannot be removed" in capfd.readouterr().err


def test_the_time_limit_leaves_the_margin() -> None:
    lived, margin = stop_module.process_age(), [0.0]
    stop = StopRequest(time_limit=1.5 * lived / 60, margin=lambda: margin[0])
    assert stop.poll() is None
    margin[0] = lived
    assert stop.poll() == TIME_LIMIT == "the time limit"


def test_the_time_limit_counts_from_the_start_of_the_process() -> None:
    time.sleep(max(0.0, psutil.Process().create_time() + 3 - time.time()))
    lived = time.time() - psutil.Process().create_time()
    assert lived > 2, "what is asserted next would hold anyway"
    # By the wall clock, which is set now and then, and a boot time in whole seconds.
    assert StopRequest(time_limit=(lived - 2) / 60).poll() == TIME_LIMIT
    assert StopRequest(time_limit=(lived + 60) / 60).poll() is None


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        ([], 0),
        (["SIGTERM"], REQUEUE),
        ([TIME_LIMIT, "SIGUSR1"], REQUEUE),
        (["SIGHUP"], INTERRUPTED),
        ([STOP_FILE], INTERRUPTED),
        (["SIGTERM", "SIGINT"], INTERRUPTED),
    ],
)
def test_a_person_outweighs_a_scheduler(reasons: list[str], code: int) -> None:
    assert exit_code(reasons) == code
