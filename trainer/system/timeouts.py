"""Runs a call that may block forever, with a timeout."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

PREFIX = "deadline: "  # of the threads' names


def run_with_timeout(seconds: float, work: Callable[[], T], name: str) -> T:
    """Run `work` in a thread; raises its exceptions, and TimeoutError after `seconds`.

    After a timeout the thread continues, perhaps forever, as on a dead NFS server: see `has_hung_threads`.
    name: of the thread, for stack traces.
    """
    future: Future[T] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=do, daemon=True, name=PREFIX + name)
    thread.start()
    thread.join(seconds)
    if not future.done():
        raise TimeoutError(f"it did not end within {seconds:g} s")
    return future.result()


def has_hung_threads() -> bool:
    """Whether a thread is still running: Python's shutdown could wait for it."""
    return any(thread.name.startswith(PREFIX) for thread in threading.enumerate())
