"""Watches what the data costs while a run goes on, and says which stage keeps it waiting."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.costs import Limit, find_limit
from pipelines.loader import ClipLoader
from trainer.meters import Totals

INTERVAL = 30.0  # seconds between two looks: long enough that single slow videos do not show


@dataclass(frozen=True)
class DataReport:
    """What was found in the time since the last look.

    limit: the stage that limits. milliseconds: what a clip costs in each stage. wait_share: of the time,
    0..1. changed: whether another stage limited before.
    """

    limit: Limit
    milliseconds: dict[str, float]
    wait_share: float
    changed: bool

    @property
    def words(self) -> str:
        """For people: what limits, what a clip costs, what to do."""
        if self.limit.stage == "model":
            return f"data keeps up: {100 * self.wait_share:.0f} % of the time spent waiting for it"
        costs = ", ".join(f"{name} {value:.1f}" for name, value in self.milliseconds.items())
        return (
            f"waiting for data {100 * self.wait_share:.0f} % of the time; {self.limit.stage} limits "
            f"(ms a clip: {costs}): {self.limit.advice}"
        )


class DataWatch:
    """Looks at one rank's training loader every so often. cores: those that the rank may use."""

    def __init__(
        self, loader: ClipLoader, cores: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._loader = loader
        self._cores = cores
        self._clock = clock
        self._looked = clock()
        self._costs = loader.costs
        self._spent: tuple[float, float] | None = None
        self._stage = ""

    def look(self, spent: Totals) -> DataReport | None:
        """A report when it is time for one. spent: of the run so far; evaluations and saves do not count."""
        if self._spent is None:
            self._spent = (spent.training, spent.waiting)
        if self._clock() - self._looked < INTERVAL:
            return None
        waited = spent.waiting - self._spent[1]
        seconds = spent.training - self._spent[0] + waited
        costs = self._loader.costs
        if seconds <= 0:
            return None
        share = waited / seconds
        limit = find_limit(costs - self._costs, seconds, share, self._loader.processes, self._cores)
        report = DataReport(limit, (costs - self._costs).per_clip(), share, limit.stage != self._stage)
        self._looked, self._costs, self._stage = self._clock(), costs, limit.stage
        self._spent = (spent.training, spent.waiting)
        return report
