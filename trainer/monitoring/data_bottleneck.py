"""Measures the input pipeline during a run, and reports the stage that limits it."""

from dataclasses import dataclass

from pipelines.bottleneck import Bottleneck, StageCosts, find_bottleneck
from pipelines.loader import ClipLoader
from trainer.monitoring.throughput import RunTotals
from trainer.system.formatting import format_percent

# Seconds of training and waiting per report: long enough to average over single slow videos.
INTERVAL = 30.0


@dataclass(frozen=True)
class DataReport:
    """The cost of data since the last report."""

    limit: Bottleneck
    """The stage that limits throughput."""
    milliseconds: dict[str, float]
    """Cost of a clip in each stage."""
    wait_share: float
    """Share of the time spent waiting for data, 0..1."""
    changed: bool
    """Whether another stage limited before."""

    @property
    def message(self) -> str:
        """Share of time spent waiting, cost of each stage, and what to do."""
        share = f"{format_percent(self.wait_share, 0)} of the time"
        if self.limit.stage == "model":
            return f"the data keeps up: {share} is spent waiting for it"
        costs = ", ".join(f"{name} {value:.1f}" for name, value in self.milliseconds.items())
        return f"{share} is spent waiting for data ({costs} ms a clip). {self.limit.advice}"


@dataclass
class DataBottleneckMonitor:
    """Reports on one rank's training loader every `INTERVAL` seconds."""

    loader: ClipLoader
    cores: int
    """Number that the rank may use."""

    def __post_init__(self) -> None:
        self._before: tuple[float, float, StageCosts] | None = None
        self._stage = ""

    def report_if_due(self, spent: RunTotals) -> DataReport | None:
        """A report if `INTERVAL` seconds of training and waiting have passed since the last, else None.

        spent: totals of the run so far.
        """
        if self._before is None:
            self._before = (spent.training, spent.waiting, self.loader.costs)
        training, waiting, costs_before = self._before
        waited = spent.waiting - waiting
        seconds = spent.training - training + waited
        if seconds < INTERVAL:
            return None
        costs = self.loader.costs - costs_before
        limit = find_bottleneck(costs, seconds, waited / seconds, self.loader.resources, self.cores)
        report = DataReport(limit, costs.per_clip(), waited / seconds, limit.stage != self._stage)
        self._before = (spent.training, spent.waiting, costs_before + costs)
        self._stage = limit.stage
        return report
