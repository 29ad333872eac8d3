"""Python's cyclic garbage collection at planned steps of a training.

Automatic collection runs whenever enough objects were made, at another step on each rank: the others then
wait for that rank in the step's all-reduce. It also visits the objects of all imported libraries, repeatedly.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

EVERY_STEPS = 20
"""Steps between two collections of what was made since the last one: about a millisecond of work
(docs/performance.md)."""
ALL_EVERY_STEPS = 1000
"""Steps between two collections of all that is not frozen, which visit what MLflow has imported since the
start: a quarter of a second."""


class PlannedCollection:
    """A context manager; inside, automatic collection is off and `collect_after` collects.

    On entry, all live objects are frozen: no later collection visits them, unless they are unfrozen.
    """

    def __init__(self) -> None:
        self._was_automatic = True

    def __enter__(self) -> Self:
        self._was_automatic = gc.isenabled()
        self._begin()
        return self

    def __exit__(self, *_: object) -> None:
        gc.unfreeze()
        if self._was_automatic:
            gc.enable()

    def _begin(self) -> None:
        gc.disable()
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def collect_after(self, step: int) -> None:
        """Collect where this step, counted from 1, is a planned one. The same steps on all ranks."""
        if step % ALL_EVERY_STEPS == 0:
            gc.collect()
        elif step % EVERY_STEPS == 0:
            gc.collect(1)  # what survives is generation 2, which only a full collection visits

    @contextmanager
    def automatic(self) -> Iterator[None]:
        """Inside, collection is as outside of this context: for work of unknown length between two steps.

        Afterwards all objects are collected, those that were frozen too.
        """
        if self._was_automatic:
            gc.enable()
        yield
        self._begin()
