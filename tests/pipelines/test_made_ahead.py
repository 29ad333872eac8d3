"""A thread that makes one result ahead."""

import threading
from collections.abc import Iterator
from itertools import count

import pytest

from pipelines.errors import DataError
from pipelines.made_ahead import MadeAhead

TIMEOUT = 30.0


class Maker:
    """Counts; each call after the first waits until it is allowed."""

    def __init__(self) -> None:
        self.calls = count()
        self.begun, self.allowed = threading.Semaphore(0), threading.Semaphore(1)

    def __call__(self) -> int:
        number = next(self.calls)
        self.begun.release()
        assert self.allowed.acquire(timeout=TIMEOUT)
        if number == 3:
            raise DataError("of number 3")
        return number


@pytest.fixture
def maker() -> Maker:
    return Maker()


@pytest.fixture
def ahead(maker: Maker) -> Iterator[MadeAhead[int]]:
    made = MadeAhead(maker, "test")
    yield made
    made.stop(TIMEOUT, interrupt=maker.allowed.release)
    assert all(thread.name != "test" for thread in threading.enumerate())


def begin(maker: Maker) -> bool:
    return maker.begun.acquire(timeout=TIMEOUT)


def test_one_result_is_made_while_the_one_before_is_used(maker: Maker, ahead: MadeAhead[int]) -> None:
    assert not maker.begun.acquire(blocking=False)  # nothing before the first is wanted
    assert ahead.next() == 0 and begin(maker)
    assert begin(maker)  # of the next, without being asked
    maker.allowed.release(5)
    assert ahead.next() == 1 and begin(maker)
    assert ahead.next() == 2 and begin(maker)
    assert not maker.begun.acquire(timeout=0.05)  # no more than one ahead


def test_an_error_is_raised_by_next_and_ends_the_thread(maker: Maker, ahead: MadeAhead[int]) -> None:
    maker.allowed.release(5)
    assert [ahead.next() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="of number 3"):
        ahead.next()
    with pytest.raises(RuntimeError, match="has failed"):
        ahead.next()


def test_a_call_that_does_not_return_is_interrupted(maker: Maker) -> None:
    ahead = MadeAhead(maker, "stuck")
    assert ahead.next() == 0 and begin(maker) and begin(maker)
    interrupted = []

    def interrupt() -> None:
        interrupted.append(True)
        maker.allowed.release()

    ahead.stop(0.05, interrupt)
    assert interrupted and all(thread.name != "stuck" for thread in threading.enumerate())
