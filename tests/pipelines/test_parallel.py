"""Results in order, whoever works, and whatever dies over it."""

import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool

import pytest

from pipelines.parallel import Isolation, ordered_map

DEADLY = {7, 40, 41, 99}
LATE = {100, 150, 640}


def square(number: int) -> int:
    return number * number


def square_or_die(number: int) -> int:
    if number in DEADLY:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def square_or_die_late(number: int) -> int:
    if number in LATE:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


@pytest.mark.parametrize(("total", "workers"), [(0, 2), (5, 2), (100, 1), (100, 3)])
def test_results_come_in_order_with_progress(total: int, workers: int) -> None:
    seen: list[tuple[int, int]] = []
    results = ordered_map(
        square, range(total), total=total, workers=workers, progress=lambda *at: seen.append(at)
    )
    assert list(results) == [number * number for number in range(total)]
    assert seen == [(done, total) for done in range(1, total + 1)]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_item_that_kills_its_process_costs_itself_only(workers: int) -> None:
    results = ordered_map(square_or_die, range(120), total=120, workers=workers, on_crash=lambda item: -item)
    assert list(results) == [-n if n in DEADLY else n * n for n in range(120)]


def test_a_late_death_while_results_are_taken_slowly_loses_nothing() -> None:
    """The pool is broken already when more is handed to it."""
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


def test_without_a_stand_in_a_death_is_an_error() -> None:
    with pytest.raises(BrokenProcessPool):
        list(ordered_map(square_or_die, range(120), total=120, workers=2))


def test_an_isolated_call_goes_on_after_a_crash() -> None:
    with Isolation() as isolation:
        assert isolation.call(square_or_die, 3) == 9
        with pytest.raises(BrokenProcessPool):
            isolation.call(square_or_die, 7)
        assert isolation.call(square_or_die, 4) == 16
