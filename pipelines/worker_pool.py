"""Worker processes: a function over many items in order, and calls that may crash."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[int, int], None]
"""Called with the number of items done, and of all."""
ProgressOf = Callable[[str], AbstractContextManager[Progress]]
"""Returns, for the name of an activity, the context in which a function shows its progress."""

_CHUNK = 16  # items: sending a single one costs about as much as probing a small video
PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_AHEAD = 4  # chunks in flight per worker: no worker waits, and a million items need little memory
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Signals that stop a run. Only its main process handles them."""


def usable_cores() -> int:
    """Cores that this process may run on: a container or SLURM may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    total: int,
    workers: int,
    progress: Progress | None = None,
    on_crash: Callable[[Item], Result] | None = None,
    chunk: int = _CHUNK,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order.

    With one worker, or few items, this process does the work. Otherwise it spawns processes: `function` must
    be importable by name, and the program's main module must have an `if __name__ == "__main__":` guard. An
    exception of `function` is raised here. Closing the generator, or Ctrl-C, cancels what has not started.

    Args:
        total: the number of items.
        progress: called after each item with the number of items done, and `total`.
        on_crash: gives the result for an item that crashes its process. With it, all work is done in
            processes.
        chunk: items per message to a process; 1 for slow items, so that progress is smooth.

    Raises:
        BrokenProcessPool: a process died, and there is no `on_crash`.
        Exception: of pickle, for an item or a result that cannot be sent to or from a process.
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
    # Not SIGTERM, with which the executor ends a broken pool. Workers of a process that was killed would wait
    # forever for more work, after finishing what they have: files that the next call writes, too.
    pool = _Pool(workers, signal.SIGINT, die_with_parent=True)
    chunks = iter(lambda: list(islice(items, chunk_size)), [])
    in_flight: deque[tuple[list[Item], Future[bytes]]] = deque()
    try:
        while True:
            while len(in_flight) <= _AHEAD * workers and (chunk := next(chunks, [])):
                in_flight.append((chunk, pool.submit(_apply, function, chunk)))
            if not in_flight:
                return
            chunk, future = in_flight.popleft()
            try:
                results: list[Result] = pickle.loads(future.result())
            except BrokenProcessPool:
                if on_crash is None:
                    raise
                # All chunks in flight died with the pool. Which item crashes is found chunk by chunk.
                pool.restart()
                results = _one_by_one(function, chunk, on_crash)
                in_flight = deque((later, pool.submit(_apply, function, later)) for later, _ in in_flight)
            yield from results
    finally:
        pool.close()


def _one_by_one(
    function: Callable[[Item], Result], chunk: list[Item], on_crash: Callable[[Item], Result]
) -> list[Result]:
    results = []
    with IsolatedProcess() as process:
        for item in chunk:
            try:
                results.append(process.call(function, item))
            except BrokenProcessPool:
                results.append(on_crash(item))
    return results


class _Pool:
    """Worker processes that can be restarted after a crash.

    blocked: signals that they do not receive. die_with_parent: the kernel kills them when the thread that
    started them ends.
    """

    def __init__(self, workers: int, *blocked: signal.Signals, die_with_parent: bool = False) -> None:
        self._workers = workers
        self._blocked = blocked
        self._die_with_parent = die_with_parent
        self._open()

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(
            self._workers, mp_context=context, initializer=die_with_parent if self._die_with_parent else None
        )

    def submit(self, function: Callable[..., object], *arguments: Any) -> Future[bytes]:
        """A future of the pickled result; it raises BrokenProcessPool if a process died before or after this
        call. Raises what pickle raises for an argument that cannot be pickled."""
        # The executor pickles in a thread: where that fails, it may wait forever for its processes.
        call = bytes(ForkingPickler.dumps((function, arguments)))
        try:
            with signals_blocked(*self._blocked):  # the first few calls start the processes
                return self._executor.submit(_call, call)
        except BrokenProcessPool as error:
            failed: Future[bytes] = Future()
            failed.set_exception(error)
            return failed

    def restart(self) -> None:
        self.close()
        self._open()

    def close(self) -> None:
        """End the processes after their current call; the rest is cancelled."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class IsolatedProcess:
    """A process for calls that may crash it, restarted when one does. It blocks `STOP_SIGNALS`.

    with IsolatedProcess() as process:
        result = process.call(function, argument)
    """

    def __enter__(self) -> IsolatedProcess:
        self._pool = _Pool(1, *STOP_SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def call(self, function: Callable[..., Result], *arguments: Any, seconds: float | None = None) -> Result:
        """The result of the call.

        Raises what `function` raises, BrokenProcessPool where the call crashes the process, and TimeoutError
        where it takes more than `seconds`; the process is then killed.
        """
        process = None if seconds is None else pickle.loads(self._pool.submit(os.getpid).result())
        future = self._pool.submit(function, *arguments)
        if process is not None and not wait([future], seconds).done:
            os.kill(process, signal.SIGKILL)
            self._pool.restart()
            raise TimeoutError(f"the call took more than {seconds:g} s")
        try:
            result: Result = pickle.loads(future.result())
        except BrokenProcessPool:
            self._pool.restart()
            raise
        return result


def _call(call: bytes) -> bytes:
    """The pickled result of a pickled function and its arguments. Runs in the process.

    An exception that the other process could not unpickle would end the pool as a crash does: one with its
    text is raised instead.
    """
    function, arguments = pickle.loads(call)
    try:
        result = function(*arguments)
    except Exception as error:
        try:
            pickle.loads(ForkingPickler.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise
    return bytes(ForkingPickler.dumps(result))


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


def die_with_parent() -> None:
    """Have the kernel kill this worker when the thread that started it ends, however it ends.

    Otherwise the workers of a process that was killed with SIGKILL would wait forever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        die_with(parent.pid)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread of its parent that started it ends.

    parent: the number of that process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)


@contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Processes and threads that start in this context never receive `signals`.

    Ctrl-C and a scheduler's signals go to all processes at once. The main process handles them: it may still
    need what the others are working on. Its own handlers of `STOP_SIGNALS` are called at the end of the
    context. If a handler raised earlier, between the start of a process and the message with its arguments,
    that process would end with a traceback.
    """
    # Python starts its resource tracker with the first process and then unblocks signals: start it first.
    resource_tracker.ensure_running()
    with _handlers_called_later():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _handlers_called_later() -> Iterator[None]:
    """Call Python's handlers of `STOP_SIGNALS` at the end of the context. Only the main thread has any.

    A signal mask is not enough: the kernel gives the signal to another thread, and Python calls its handler
    in the main thread.
    """
    received: list[int] = []
    handlers: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if callable(handler := signal.getsignal(number)):
                    handlers[number] = handler
                    signal.signal(number, lambda number, _: received.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)
