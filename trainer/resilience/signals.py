"""Leaving on request: the step is finished and the checkpoint written before the process goes.

SIGTERM and SIGUSR1 come from a scheduler that wants the machine back, and a time limit says the same before
it must: the process leaves with a code that means "start me again". SIGINT is a person's Ctrl-C, SIGHUP their
closed terminal, a file named STOP their word without either: no one should start it again unasked. A second
SIGINT does not wait for anything. A launcher that was killed can ask no more: that it is gone says so.
"""

import os
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

REQUEUE = 85
"""Exit code after a scheduler's request: saved, to be continued. The code is ours, no shell uses it."""

INTERRUPTED = 130
"""Exit code after a person's request: the shell's 128 + 2, of SIGINT."""

STOP_FILE = "the file STOP"
LAUNCHER_GONE = "the end of its launcher"
TIME_LIMIT = "the time limit"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PERSONAL = {"SIGINT", "SIGHUP", STOP_FILE}

_AGAIN = "A Ctrl-C from now on leaves at once, without saving."

_LOOK_EVERY = 3.0  # seconds: a shared filesystem need not be asked at every step

_Handler = Callable[[int, FrameType | None], object] | int | None


def exit_code(reasons: Iterable[str]) -> int:
    """What every rank leaves with, given all that `StopRequest.poll` returned on any: 0 without a reason.

    Where a person asked too, the run is not to be started again unasked.
    """
    heard = set(reasons)
    if not heard:
        return 0
    return INTERRUPTED if heard & _PERSONAL else REQUEUE


class StopRequest:
    """Remembers that the process was asked to leave; a context manager that puts handlers back.

    From then on, writing to a terminal or pipe that is gone does no harm.

    The loop calls `poll` between steps. Ranks may differ in what they have heard: agreeing on a stop
    is the loop's task.
    """

    def __init__(
        self,
        announce: bool = True,
        *,
        stop_file: Path | None = None,
        time_limit: float | None = None,
        job_end: float | None = None,
        margin: Callable[[], float] = lambda: 0.0,
        launcher_is_gone: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            announce: whether to say on standard error what was heard; one rank is enough.
            stop_file: whose appearance asks to leave, to be removed when seen; for one rank, None for others.
            time_limit: minutes from the start of this process at which it must be gone; None has no limit.
            job_end: when the scheduler will end it, in seconds since 1970; whichever is earlier counts.
            margin: seconds before that limit at which to ask; what a step and a save take, as known by then.
            launcher_is_gone: whether what started this process was killed, and so nobody would end it.
        """
        self._announce = announce
        self._stop_file = stop_file
        self._looked = -_LOOK_EVERY
        self._launcher_is_gone = launcher_is_gone
        now = time.monotonic()
        self._begun = now - process_age()
        # The wall clock is asked this once: it may be set while the run goes on.
        ends = [] if job_end is None else [now + job_end - time.time()]
        if time_limit is not None:
            ends.append(self._begun + 60 * time_limit)
        self._end = min(ends, default=None)
        self._margin = margin
        self._reason: str | None = None
        self._interrupts = 0
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only.
        assert threading.current_thread() is threading.main_thread()
        # `nohup` starts a process with SIGHUP ignored: it is to outlive its terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        self._previous = {
            number: signal.signal(number, self._heard) for number in _SIGNALS if number not in ignored
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def poll(self) -> str | None:
        """Inspect the stop file, the time limit and the launcher; once a reason is found, the file is removed
        and the reason printed.

        Returns why to leave, in words that follow "stopped by": a signal's name such as "SIGTERM", "the time
        limit", "the file STOP" or "the end of its launcher", whichever came first; None while nobody asked.
        """
        if self._reason is not None:
            _drop_broken_outputs()
            return self._reason
        if self._end is not None and time.monotonic() >= self._leaves_at(self._end):
            self._note(TIME_LIMIT)
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            if self._stop_file is not None:
                self._look_for(self._stop_file)
            if self._launcher_is_gone():
                self._note(LAUNCHER_GONE)
        return self._reason

    def _leaves_at(self, end: float) -> float:
        """When to ask, so as to be gone by the end.

        The margin is generous. Where a job is hardly longer, half of its time is for work all the same: else
        each start of it would leave with next to nothing done. However short it is, the loop hears of this
        only after a step, so that every start gets further.
        """
        return max(end - self._margin(), (self._begun + end) / 2)

    def _look_for(self, file: Path) -> None:
        try:
            file.unlink()  # so that the next start does not stop at once
        except OSError as error:
            if not os.path.lexists(file):  # as nearly always; or the filesystem does not answer just now
                return
            self._say(f"{file} cannot be removed ({error.strerror}): remove it before the next start")
        self._note(STOP_FILE)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        heard = signal.Signals(number)
        self._interrupts += heard is signal.SIGINT
        if self._interrupts > 1:
            # Not an exception: it could be caught, or wait for threads and ranks that hang.
            os._exit(INTERRUPTED)
        if heard is signal.SIGHUP:
            # A terminal is gone, and what reads a pipe goes with it; what is written to a file still counts.
            _drop_outputs(lambda output: _is_broken(output) or not stat.S_ISREG(os.fstat(output).st_mode))
        self._note(heard.name)

    def _note(self, reason: str) -> None:
        if self._reason is None:
            self._reason = reason
            self._say(f"{reason}: finishing the step, then saving. {_AGAIN}")

    def _say(self, text: str) -> None:
        if self._announce:
            _drop_broken_outputs()
            # Not `print`: it may be in the middle of a line, whose lock this very thread holds.
            with suppress(OSError):  # what reads the other end of a pipe may end by the same Ctrl-C
                os.write(2, f"\n{text}\n".encode())


def _drop_broken_outputs() -> None:
    """Drop an output that nobody reads any more, such as a pipe into `tee` that Ctrl-C ended too."""
    _drop_outputs(_is_broken)


def _drop_outputs(is_lost: Callable[[int], bool]) -> None:
    """Send what is written to a lost standard output or error to nowhere: the write would fail, and what
    wrote it with it.
    """
    for output in (1, 2):
        if is_lost(output):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)


def _is_broken(output: int) -> bool:
    poll = select.poll()
    poll.register(output, 0)  # errors and hang-ups are told unasked
    return bool(poll.poll(0))


def process_age() -> float:
    """Seconds since this process was started; libraries take a good part of a minute to load."""
    # The 22nd field is the start in clock ticks since boot; the 2nd, the name in brackets, may hold blanks.
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
