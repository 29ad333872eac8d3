"""Planned garbage collection: what is collected at which step, and what is left afterwards."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from trainer.system.garbage_collection import ALL_EVERY_STEPS, EVERY_STEPS, PlannedCollection


class Cycle:
    """Is freed by the cyclic collector only."""

    def __init__(self) -> None:
        self.itself = self


def cycle() -> weakref.ref[Cycle]:
    return weakref.ref(Cycle())


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    gc.collect()
    frozen = gc.get_freeze_count()  # in Python 3.12 a full collection freezes immortal objects
    yield
    gc.collect()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_cycles_of_the_steps_are_collected_at_planned_steps_only() -> None:
    with PlannedCollection() as garbage:
        dead = cycle()
        kept = [Cycle() for _ in range(20 * gc.get_threshold()[0])]  # automatic collection would run
        for step in range(1, EVERY_STEPS):
            garbage.collect_after(step)
        assert dead() is not None
        garbage.collect_after(EVERY_STEPS)
        assert dead() is None
        survivor = weakref.ref(kept[0])
        kept.clear()
        later = cycle()
        garbage.collect_after(2 * EVERY_STEPS)
        assert later() is None and survivor() is not None
        garbage.collect_after(ALL_EVERY_STEPS)
        assert survivor() is None


def test_what_lives_at_the_start_is_visited_by_no_planned_collection() -> None:
    before = [Cycle()]
    frozen = weakref.ref(before[0])
    with PlannedCollection() as garbage:
        before.clear()
        garbage.collect_after(ALL_EVERY_STEPS)
        assert frozen() is not None
    gc.collect()
    assert frozen() is None


def test_collection_is_automatic_again_after_an_error() -> None:
    with pytest.raises(ValueError, match="of a step"), PlannedCollection():
        assert not gc.isenabled()
        raise ValueError("of a step")


def test_an_evaluation_collects_automatically_and_frees_what_was_frozen() -> None:
    before = [Cycle()]
    frozen = weakref.ref(before[0])
    with PlannedCollection() as garbage:
        with garbage.automatic():
            assert gc.isenabled()
            before.clear()
            dead = cycle()
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        assert frozen() is None and dead() is None


def test_a_process_without_automatic_collection_keeps_it_off() -> None:
    gc.disable()
    try:
        with PlannedCollection() as garbage, garbage.automatic():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
