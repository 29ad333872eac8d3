"""The locks of DALI's queues of tasks and of results, which a worker that dies with one never releases.

DALI 2.4 notices the death, and then waits for that lock itself, for ever, as the main thread and the other
workers do. Seen at the results, with a worker that a decoder ended while its second thread handed over the
sample before.
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
    """From the death of a worker on, release a lock when a dead process holds it.

    pipeline: built. workers: its processes. Returns a function that ends this, to be called once the pipeline
    is closed. Reads private members of DALI and Python: see `tests/pipelines/dali/test_worker_lock.py`.
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
    else:  # Python's release() would count this process as a holder less than none
        ctypes.CDLL(None).sem_post(ctypes.c_void_p(lock._semlock.handle))  # type: ignore[attr-defined]
