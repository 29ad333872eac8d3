"""Work that may never come to an end, as that of a library which waits for a word from outside."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

PREFIX = "deadline: "  # of the names of the threads that such work is done in


def run_with_timeout(seconds: float, work: Callable[[], T], name: str) -> T:
    """Do `work` in a thread of its own; raises what it raises, and TimeoutError when it takes longer.

    A thread that is too late goes on, perhaps for ever, as one does that looks at a dead NFS server: see
    `has_hung_threads`. name: of the work, for whoever looks at the stacks.
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
        raise TimeoutError(f"it came to no end within {seconds:g} s")
    return future.result()


def has_hung_threads() -> bool:
    """Whether some work still hangs in its thread: Python's end would wait for libraries that it holds."""
    return any(thread.name.startswith(PREFIX) for thread in threading.enumerate())
