"""Releases the locks of DALI's task and result queues after the death of a worker that held one.

DALI 2.4 notices the death and then waits for that lock forever, as do the main thread and the other workers.
Observed at the result queue: a decoder crashed the worker while its second thread returned the previous
sample.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable
from multiprocessing import Pipe
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Lock
from typing import Any

HOLDING_TAKES = 1.0  # seconds; a living process holds the lock for microseconds


def release_after_deaths(pipeline: Any, workers: Iterable[BaseProcess]) -> Callable[[], None]:
    """Start a thread that releases a lock that a dead process holds, from the death of a worker on.

    pipeline: built. workers: its processes. Returns a function that ends the thread, to be called once the
    pipeline is closed. Uses private members of DALI and Python, which
    `tests/pipelines/dali/test_worker_lock.py` checks.
    """
    pool = pipeline._py_pool.pool
    locks: list[Lock] = [
        queue.lock for queue in (pool._result_queue, pool._general_task_queue) if queue is not None
    ]
    sentinels = [process.sentinel for process in workers]
    ended, end = Pipe(duplex=False)

    def watch() -> None:
        with ended:
            if ended in wait([*sentinels, ended]):
                return
            while not ended.poll(HOLDING_TAKES):
                for lock in locks:
                    _release_if_dead(lock)

    threading.Thread(target=watch, name="worker-lock", daemon=True).start()
    return end.close


def _release_if_dead(lock: Lock) -> None:
    if lock.acquire(timeout=HOLDING_TAKES):
        lock.release()
    else:  # Python's release() would make this process's count of acquisitions negative
        ctypes.CDLL(None).sem_post(ctypes.c_void_p(lock._semlock.handle))  # type: ignore[attr-defined]
