"""One function over many items in several processes, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Handing over one item costs about what probing one small video costs; by the chunk it does not show.
_CHUNK = 16
# What asks a run to leave. Only its main process acts on them.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
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
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order.

    With one worker, or few items, the work is done here. Otherwise processes are spawned: `function` must be
    importable by name, and the program's main module must keep its work behind
    `if __name__ == "__main__":`. What `function` raises is raised here. Closing the generator, or Ctrl-C,
    drops what has not begun.

    Args:
        total: the number of items.
        progress: called after each item with the number of items done, and `total`.
    """
    workers = min(workers, total // _CHUNK)
    results = _in_processes(function, iter(items), workers) if workers > 1 else map(function, items)
    for done, result in enumerate(results, start=1):
        if progress is not None:
            progress(done, total)
        yield result


def _in_processes(
    function: Callable[[Item], Result], items: Iterator[Item], workers: int
) -> Iterator[Result]:
    executor = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    under_way: deque[Future[list[Result]]] = deque()
    try:
        while chunk := list(islice(items, _CHUNK)):
            # The first few start the processes. SIGTERM stays: the executor ends a broken pool with it.
            with signals_blocked(signal.SIGINT):
                under_way.append(executor.submit(_apply, function, chunk))
            if len(under_way) > _AHEAD * workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]


@contextmanager
def signals_blocked(*signals: signal.Signals) -> Iterator[None]:
    """Processes and threads that start inside never hear `signals`, which ask a program to leave.

    Ctrl-C and a scheduler's signals go to all processes at once. It is for the main one to act on them: it
    may still want what the others are at.
    """
    # Python starts its resource tracker with the first process and unblocks signals after it: start it first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
