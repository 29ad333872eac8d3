"""One result ahead of its use, made by a thread."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")


class MadeAhead(Generic[Result]):
    """Calls a function again and again in a thread: `next` returns the result of the call before, and starts
    the next one.

    The first `next` starts the thread. It is a daemon: a process that exits does not wait for it.
    """

    def __init__(self, make: Callable[[], Result], name: str) -> None:
        """Args:
        make: its exceptions are raised by `next`, and end the thread.
        name: of the thread.
        """
        self._make = make
        self._name = name
        self._wanted = threading.Semaphore(1)  # results to make
        self._results: SimpleQueue[tuple[Result | None, BaseException | None]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = False

    def next(self) -> Result:
        """The next result. Waits for it; raises what making it raised."""
        if self._error is not None:
            raise RuntimeError("an earlier call has failed") from self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        result, self._error = self._results.get()
        if self._error is not None:
            raise self._error
        self._wanted.release()
        return result  # type: ignore[return-value]

    def stop(self, patience: float, interrupt: Callable[[], None]) -> None:
        """End the thread; `next` must not be called afterwards.

        Args:
            patience: seconds to wait for the call in progress, and again after `interrupt`.
            interrupt: makes the call in progress return or raise.
        """
        self._stopped = True
        self._wanted.release()
        if self._thread is not None:
            self._thread.join(patience)
            if self._thread.is_alive():
                interrupt()
                self._thread.join(patience)

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._stopped:
                return
            try:
                result = self._make()
            except BaseException as error:  # raised again by `next`
                self._results.put((None, error))
                return
            self._results.put((result, None))
            del result  # its consumer alone keeps it alive
