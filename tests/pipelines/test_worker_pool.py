"""Results come in order, with any number of workers, and after crashes."""

import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from pipelines.worker_pool import IsolatedProcess, ordered_map
from tests.pipelines.squares import DEADLY, LATE, refuse, square, square_or_die, square_or_die_late


@pytest.mark.parametrize(("total", "workers"), [(0, 2), (5, 2), (100, 1), (100, 3)])
def test_results_come_in_order_with_progress(total: int, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    results = ordered_map(
        square, range(total), total=total, workers=workers, progress=lambda *at: seen.append(at)
    )
    assert list(results) == [number * number for number in range(total)]
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_loses_only_the_item_that_caused_it(workers: int) -> None:
    results = ordered_map(square_or_die, range(120), total=120, workers=workers, on_crash=lambda item: -item)
    assert list(results) == [-n if n in DEADLY else n * n for n in range(120)]


def test_a_late_crash_while_results_are_read_slowly_loses_nothing() -> None:
    """The pool is already broken when the next chunk is submitted."""
    total = 700
    results = ordered_map(
        square_or_die_late, range(total), total=total, workers=2, on_crash=lambda item: -item
    )
    seen = []
    for result in results:
        seen.append(result)
        if len(seen) == 1:
            time.sleep(1.0)
    assert seen == [-n if n in LATE else n * n for n in range(total)]


def test_without_on_crash_a_crash_is_an_error() -> None:
    with pytest.raises(BrokenProcessPool):
        list(ordered_map(square_or_die, range(120), total=120, workers=2))


def test_an_isolated_process_restarts_after_a_crash() -> None:
    with IsolatedProcess() as process:
        assert process.call(square_or_die, 3) == 9
        with pytest.raises(BrokenProcessPool):
            process.call(square_or_die, 7)
        assert process.call(square_or_die, 4) == 16


def test_what_cannot_be_pickled_is_an_error_of_its_call() -> None:
    """The executor waits forever for some of these, or takes them for a crash."""
    locks = [threading.Lock()] * 64
    with pytest.raises(TypeError, match="lock"):
        list(ordered_map(square, locks, total=64, workers=2, on_crash=lambda _: -1))  # type: ignore[arg-type]
    with IsolatedProcess() as process:
        with pytest.raises(TypeError, match="lock"):
            process.call(square, locks[0])
        with pytest.raises(TypeError, match="lock"):
            process.call(threading.Lock)
        with pytest.raises(RuntimeError, match="Refused: 3"):
            process.call(refuse, 3)
        assert process.call(square, 4) == 16


def test_an_isolated_call_that_takes_too_long_is_killed() -> None:
    with IsolatedProcess() as process:
        with pytest.raises(TimeoutError, match=r"0\.2 s"):
            process.call(time.sleep, 600, seconds=0.2)
        assert process.call(square_or_die, 4, seconds=60) == 16


def test_a_signal_during_the_start_of_a_process_is_handled_after_it() -> None:
    """SIGTERM arrives when the first process runs and has not received its arguments."""
    program = """
import os, signal, sys, threading
from multiprocessing import util
from pipelines.worker_pool import ordered_map

def start_then_signal(path, arguments, passfds, start=util.spawnv_passfds):
    number = start(path, arguments, passfds)
    if "--multiprocessing-fork" in arguments:  # not the resource tracker
        os.kill(os.getpid(), signal.SIGTERM)
    return number

if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()  # receives what the main one blocks
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    util.spawnv_passfds = start_then_signal
    list(ordered_map(abs, range(64), total=64, workers=2))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (143, "")
