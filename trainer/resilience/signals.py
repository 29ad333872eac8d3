"""Stop requests: signals, a STOP file, a time limit or the end of the launcher.

The step is finished and a checkpoint written before the process exits. SIGTERM and SIGUSR1 come from a
scheduler; after them, the time limit or the end of the launcher, the exit code requests a restart.
SIGINT (Ctrl-C), SIGHUP (a closed terminal) and the STOP file come from a person; the exit code requests no
restart. A second SIGINT exits at once.
"""

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from trainer.resilience.process_identity import process_age

REQUEUE = 85
"""Exit code after a scheduler's request: saved, to be restarted. No shell uses this code."""

INTERRUPTED = 130
"""Exit code after a person's request: 128 + SIGINT, as in shells."""

STOP_FILE = "the file STOP"
LAUNCHER_GONE = "the end of its launcher"
TIME_LIMIT = "the time limit"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PERSONAL = {"SIGINT", "SIGHUP", STOP_FILE}

_AGAIN = "A Ctrl-C from now on leaves at once, without saving."

_POLL_EVERY = 3.0  # seconds between queries of the STOP file, which may be on a shared file system

_Handler = Callable[[int, FrameType | None], object] | int | None


def exit_code(reasons: Iterable[str]) -> int:
    """The exit code of all ranks, from the results of `StopRequest.poll` on all ranks; 0 without a reason.

    If one of them is a person's, the run is not restarted.
    """
    found = set(reasons)
    if not found:
        return 0
    return INTERRUPTED if found & _PERSONAL else REQUEUE


@dataclass
class StopRequest:
    """Records a stop request; a context manager that restores the signal handlers.

    After a request, writing to a closed terminal or pipe raises no error.

    The loop calls `poll` between steps. Ranks may differ in their result: agreeing on a stop
    is the loop's task.
    """

    announce: bool = True
    """Whether to print requests to standard error; one rank is enough."""
    stop_file: Path | None = None
    """Requests a stop if it exists, and is removed; None on all ranks but one."""
    time_limit: float | None = None
    """Minutes from the start of this process to its end; None: no limit."""
    job_end: float | None = None
    """When the scheduler ends the job, in seconds since 1970; the earlier limit counts."""
    margin: Callable[[], float] = lambda: 0.0
    """Seconds before that limit at which to ask; what a step and a save take, as known by then."""
    launcher_is_gone: Callable[[], bool] = lambda: False
    """Whether the launcher was killed, so that nothing would end this process."""

    def __post_init__(self) -> None:
        self._polled = -_POLL_EVERY
        now = time.monotonic()
        self._begun = now - process_age()
        # The wall clock is read once: it may be set during the run.
        ends = [] if self.job_end is None else [now + self.job_end - time.time()]
        if self.time_limit is not None:
            ends.append(self._begun + 60 * self.time_limit)
        self._end = min(ends, default=None)
        self._reason: str | None = None
        self._interrupts = 0
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only.
        assert threading.current_thread() is threading.main_thread()
        # `nohup` starts a process with SIGHUP ignored, so that it outlives its terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in _SIGNALS if number not in ignored
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def poll(self) -> str | None:
        """Inspect the stop file, the time limit and the launcher; once a reason is found, the file is removed
        and the reason printed.

        Returns the reason, which follows "stopped by": a signal's name such as "SIGTERM", "the time
        limit", "the file STOP" or "the end of its launcher", whichever came first; None without a request.
        """
        if self._reason is not None:
            _drop_outputs()
            return self._reason
        if self._end is not None and time.monotonic() >= self._stop_time(self._end):
            self._note(TIME_LIMIT)
        now = time.monotonic()
        if now - self._polled >= _POLL_EVERY:
            self._polled = now
            if self.stop_file is not None:
                self._check_stop_file(self.stop_file)
            if self.launcher_is_gone():
                self._note(LAUNCHER_GONE)
        return self._reason

    def _stop_time(self, end: float) -> float:
        """When to request a stop, so that the process has exited by `end`.

        The margin is generous. At least half of a job's time is for training: a short job would otherwise
        stop with next to nothing done. The loop checks after a step, so every attempt makes progress.
        """
        return max(end - self.margin(), (self._begun + end) / 2)

    def _check_stop_file(self, file: Path) -> None:
        try:
            file.unlink()  # so that the next start does not stop at once
        except OSError as error:
            if not os.path.lexists(file):  # there is none, or the file system does not answer
                return
            self._say(f"{file} cannot be removed ({error.strerror}): remove it before the next start")
        self._note(STOP_FILE)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        self._interrupts += received is signal.SIGINT
        if self._interrupts > 1:
            # Not an exception, which could be caught or wait for threads and ranks that hang.
            os._exit(INTERRUPTED)
        if received is signal.SIGHUP:
            # The terminal is closed, and the readers of pipes end with it; files are kept.
            _drop_outputs(lambda output: _is_broken(output) or not stat.S_ISREG(os.fstat(output).st_mode))
        self._note(received.name)

    def _note(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._say(f"{reason}: finishing the step, then saving. {_AGAIN}")

    def _say(self, text: str) -> None:
        if self.announce:
            _drop_outputs()
            # Not `print`: this thread may hold its lock, in the middle of a line.
            with suppress(OSError):  # the reader of a pipe may end by the same Ctrl-C
                os.write(2, f"\n{text}\n".encode())


def _is_broken(output: int) -> bool:
    poll = select.poll()
    poll.register(output, 0)  # errors and hang-ups are always reported
    return bool(poll.poll(0))


def _drop_outputs(is_lost: Callable[[int], bool] = _is_broken) -> None:
    """Redirect a lost standard output or error to /dev/null: writes to it would raise an error.

    By default outputs without a reader are lost, such as a pipe into `tee` that Ctrl-C ended too.
    """
    for output in (1, 2):
        if is_lost(output):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)
