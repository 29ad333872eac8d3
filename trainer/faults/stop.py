"""Leaving on request: a signal lets the step finish and the checkpoint be written.

SIGTERM and SIGUSR1 come from a scheduler that wants the machine back: the process leaves with a code
that means "start me again". SIGINT is a person's Ctrl-C: no one should start it again unasked. A second
SIGINT does not wait for anything.
"""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

REQUEUE = 85
"""Exit code after SIGTERM or SIGUSR1: saved, to be continued. The code is ours, no shell uses it."""

INTERRUPTED = 130
"""Exit code after SIGINT: the shell's 128 + 2."""

_EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: REQUEUE, signal.SIGUSR1: REQUEUE}

_AGAIN = "Ctrl-C again leaves at once, without saving."

_Handler = Callable[[int, FrameType | None], object] | int | None


class StopRequest:
    """Remembers that the process was asked to leave; a context manager that puts handlers back.

    The loop asks `requested` between steps. Ranks may differ in what they have heard: agreeing on a stop
    is the loop's task.
    """

    def __init__(self, announce: bool = True) -> None:
        """announce: whether to say on standard error that a signal was heard; one rank is enough."""
        self._announce = announce
        self._first: signal.Signals | None = None
        self._interrupts = 0
        self._previous: dict[signal.Signals, _Handler] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only.
        assert threading.current_thread() is threading.main_thread()
        self._previous = {number: signal.signal(number, self._heard) for number in _EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None is a handler that was not installed from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def requested(self) -> str | None:
        """Name of the first signal heard, such as "SIGTERM"; None while nobody asked."""
        return self._first.name if self._first else None

    @property
    def exit_code(self) -> int:
        """What the process leaves with: 0, REQUEUE or INTERRUPTED."""
        return _EXIT_CODES[self._first] if self._first else 0

    def _heard(self, number: int, frame: FrameType | None) -> None:
        heard = signal.Signals(number)
        self._interrupts += heard is signal.SIGINT
        if self._interrupts > 1:
            # Not an exception: it could be caught, or wait for threads and ranks that hang.
            os._exit(INTERRUPTED)
        if self._first is None:
            self._first = heard
            if self._announce:
                # Not `print`: it may be in the middle of a line, whose lock this very thread holds.
                os.write(2, f"\n{heard.name}: finishing the step, then saving. {_AGAIN}\n".encode())
