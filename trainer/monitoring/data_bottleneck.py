"""Watches what the data costs while a run goes on, and says which stage keeps it waiting."""

from dataclasses import dataclass

from pipelines.bottleneck import Bottleneck, StageCosts, find_bottleneck
from pipelines.loader import ClipLoader
from trainer.monitoring.throughput import RunTotals
from trainer.system.formatting import format_percent

# Seconds of training and waiting between two looks: long enough that single slow videos do not show.
INTERVAL = 30.0


@dataclass(frozen=True)
class DataReport:
    """What was found in the time since the last look.

    limit: the stage that limits. milliseconds: what a clip costs in each stage. wait_share: of the time,
    0..1. changed: whether another stage limited before.
    """

    limit: Bottleneck
    milliseconds: dict[str, float]
    wait_share: float
    changed: bool

    @property
    def message(self) -> str:
        """For people: how much of the time the data takes, which stage of it most, what to do."""
        share = f"{format_percent(self.wait_share, 0)} of the time"
        if self.limit.stage == "model":
            return f"the data keeps up: {share} is spent waiting for it"
        costs = ", ".join(f"{name} {value:.1f}" for name, value in self.milliseconds.items())
        return f"{share} is spent waiting for data ({costs} ms a clip). {self.limit.advice}"


class DataBottleneckMonitor:
    """Looks at one rank's training loader every so often. cores: those that the rank may use."""

    def __init__(self, loader: ClipLoader, cores: int) -> None:
        self._loader = loader
        self._cores = cores
        self._before: tuple[float, float, StageCosts] | None = None
        self._stage = ""

    def report_if_due(self, spent: RunTotals) -> DataReport | None:
        """A report when it is time for one. spent: of the run so far; evaluations and saves do not count."""
        if self._before is None:
            self._before = (spent.training, spent.waiting, self._loader.costs)
        training, waiting, costs_before = self._before
        waited = spent.waiting - waiting
        seconds = spent.training - training + waited
        if seconds < INTERVAL:
            return None
        costs = self._loader.costs - costs_before
        limit = find_bottleneck(costs, seconds, waited / seconds, self._loader.resources, self._cores)
        report = DataReport(limit, costs.per_clip(), waited / seconds, limit.stage != self._stage)
        self._before = (spent.training, spent.waiting, costs_before + costs)
        self._stage = limit.stage
        return report
