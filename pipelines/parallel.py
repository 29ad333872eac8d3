"""One function over many items in several processes, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Handing over one item costs about what a short probe costs; in chunks it does not show.
_CHUNK = 16


def usable_cores() -> int:
    """Cores this process may run on, which a container or SLURM can make fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def ordered_map(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in order.

    With one worker the work is done here. With more, processes are spawned: `function` must be importable by
    name, and the program's main module must keep its work behind `if __name__ == "__main__":`. What
    `function` raises is raised here. Closing the generator drops what has not begun.

    Args:
        progress: called after each item with the number of items done and of all items.
    """
    with _mapper(min(workers, len(items) // _CHUNK)) as mapped:
        for done, result in enumerate(mapped(function, items), start=1):
            if progress is not None:
                progress(done, len(items))
            yield result


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` over this many processes, or the built-in one when more than one would have nothing to do."""
    if workers <= 1:
        yield map
        return
    executor = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_leave_interrupts_to_the_parent,
    )
    try:
        yield partial(executor.map, chunksize=_CHUNK)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
