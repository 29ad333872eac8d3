"""One function over many items in several processes, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Handing over one item costs about what probing one small video costs; by the chunk it does not show.
_CHUNK = 16
# What asks a run to leave. Only its main process acts on them.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Chunks under way for each worker: enough that none waits, few enough that a million items need no memory.
_AHEAD = 4


def usable_cores() -> int:
    """Cores this process may run on, which a container or a batch system can make fewer than there are."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    total: int,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
    on_crash: Callable[[Item], Result] | None = None,
    chunk: int = _CHUNK,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order.

    With one worker, or few items, the work is done here. Otherwise processes are spawned: `function` must be
    importable by name, and the program's main module must keep its work behind
    `if __name__ == "__main__":`. What `function` raises is raised here. Closing the generator, or Ctrl-C,
    drops what has not begun.

    Args:
        total: the number of items.
        progress: called after each item with the number of items done, and `total`.
        on_crash: what stands for an item over which a process died. Given, the work is never done here.
        chunk: items that a process is handed at a time; 1 for slow ones, so that progress shows.

    Raises:
        BrokenProcessPool: a process died, and there is no `on_crash`.
    """
    workers = max(min(workers, total // chunk), 1 if on_crash is not None else 0)
    if workers > 1 or on_crash is not None:
        results = _in_processes(function, iter(items), workers, on_crash, chunk)
    else:
        results = map(function, items)
    for done, result in enumerate(results, start=1):
        if progress is not None:
            progress(done, total)
        yield result


def _in_processes(
    function: Callable[[Item], Result],
    items: Iterator[Item],
    workers: int,
    on_crash: Callable[[Item], Result] | None,
    chunk_size: int,
) -> Iterator[Result]:
    pool = _Pool(workers, signal.SIGINT)  # SIGTERM stays: the executor ends a broken pool with it
    chunks = iter(lambda: list(islice(items, chunk_size)), [])
    under_way: deque[tuple[list[Item], Future[list[Result]]]] = deque()
    try:
        while True:
            while len(under_way) <= _AHEAD * workers and (chunk := next(chunks, [])):
                under_way.append((chunk, pool.submit(_apply, function, chunk)))
            if not under_way:
                return
            chunk, future = under_way.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                if on_crash is None:
                    raise
                # All that was under way died with the pool; whose fault it was shows chunk by chunk.
                pool.renew()
                results = _one_by_one(function, chunk, on_crash)
                under_way = deque((later, pool.submit(_apply, function, later)) for later, _ in under_way)
            yield from results
    finally:
        pool.close()


def _one_by_one(
    function: Callable[[Item], Result], chunk: list[Item], on_crash: Callable[[Item], Result]
) -> list[Result]:
    results = []
    with IsolatedProcess() as isolation:
        for item in chunk:
            try:
                results.append(isolation.call(function, item))
            except BrokenProcessPool:
                results.append(on_crash(item))
    return results


class _Pool:
    """Worker processes, to be renewed when they broke. deaf_to: signals that they never hear."""

    def __init__(self, workers: int, *deaf_to: signal.Signals) -> None:
        self._workers = workers
        self._deaf_to = deaf_to
        self._open()

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self._workers, mp_context=context)

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """A future, which raises BrokenProcessPool where a process died, before or after."""
        try:
            with signals_blocked(*self._deaf_to):  # the first few calls start the processes
                return self._executor.submit(function, *arguments)
        except BrokenProcessPool as error:
            failed: Future[Result] = Future()
            failed.set_exception(error)
            return failed

    def renew(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        """End the processes when they have done what they are at; the rest is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class IsolatedProcess:
    """A process for calls that may crash it, renewed when one does; deaf to what asks a run to leave.

    with IsolatedProcess() as isolation:
        result = isolation.call(function, argument)
    """

    def __enter__(self) -> IsolatedProcess:
        self._pool = _Pool(1, *STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def call(self, function: Callable[..., Result], *arguments: Any, seconds: float | None = None) -> Result:
        """Raises what `function` raises, BrokenProcessPool where the call ends the process, and TimeoutError
        where it takes more than so many seconds, after which the process is killed.
        """
        process = None if seconds is None else self._pool.submit(os.getpid).result()
        future = self._pool.submit(function, *arguments)
        if process is not None and not wait([future], seconds).done:
            os.kill(process, signal.SIGKILL)
            self._pool.renew()
            raise TimeoutError(f"the call took more than {seconds:g} s")
        try:
            return future.result()
        except BrokenProcessPool:
            self._pool.renew()
            raise


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


@contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Processes and threads that start inside never hear `signals`, which ask a program to leave.

    Ctrl-C and a scheduler's signals go to all processes at once. It is for the main one to act on them: it
    may still want what the others are at. Its own handlers, of all STOP_SIGNALS, are called at the end: one
    that raises between a process's start and the hand-over of what that process needs would leave it with
    a traceback.
    """
    # Python starts its resource tracker with the first process and unblocks signals after it: start it first.
    resource_tracker.ensure_running()
    with _handlers_called_later():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers_called_later() -> Iterator[None]:
    """Keep Python's handlers of STOP_SIGNALS until the end. Only the main thread has any.

    A mask does not do that: the kernel gives a signal to another thread, and Python calls its handler here.
    """
    arrived: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, _: arrived.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in arrived:
            signal.raise_signal(late)
