"""What a run is told of its data: when, and in which words."""

from dataclasses import dataclass, field

import torch

from pipelines.bottleneck import StageCosts
from pipelines.dali.pipeline import LoaderResources
from trainer.monitoring.data_bottleneck import INTERVAL, DataBottleneckMonitor
from trainer.monitoring.throughput import RunTotals


@dataclass
class Loader:
    """As much of a `ClipLoader` as is looked at, with costs as they are set."""

    costs: StageCosts = field(default_factory=StageCosts)
    resources: LoaderResources = field(default_factory=lambda: LoaderResources(torch.device("cpu"), 2, 2, 2))


def test_a_report_comes_every_interval_and_says_when_the_limit_changes() -> None:
    loader, spent = Loader(), RunTotals()
    watch = DataBottleneckMonitor(loader, cores=2)  # type: ignore[arg-type]
    assert watch.report_if_due(spent) is None

    def pass_by(waiting: float, costs: StageCosts) -> None:
        spent.waiting += waiting
        spent.training += INTERVAL - waiting
        loader.costs = loader.costs + costs

    decoding = StageCosts(clips=600, read=1.0, decode=57.0, augment=3.0)
    pass_by(0.0, decoding)
    first = watch.report_if_due(spent)
    assert first is not None
    assert (first.limit.stage, first.changed) == ("model", True)
    assert "keeps up: 0 % of the time" in first.message
    assert watch.report_if_due(spent) is None  # it has just looked

    pass_by(15.0, decoding)
    second = watch.report_if_due(spent)
    assert second is not None
    assert (second.limit.stage, second.changed) == ("decode", True)
    assert second.milliseconds["decode"] == 95.0  # since the last look, not since the beginning
    assert "50 % of the time is spent waiting for data" in second.message
    assert "Decoding limits" in second.message
    assert "data.workers" in second.message

    pass_by(15.0, decoding)
    third = watch.report_if_due(spent)
    assert third is not None
    assert (third.limit.stage, third.changed) == ("decode", False)


def test_only_time_of_training_and_waiting_counts() -> None:
    """After an evaluation of an hour, the steps since the last look are still too few to judge."""
    loader, spent = Loader(), RunTotals()
    watch = DataBottleneckMonitor(loader, cores=2)  # type: ignore[arg-type]
    watch.report_if_due(spent)
    spent.evaluating += 3600
    spent.training = INTERVAL / 2
    assert watch.report_if_due(spent) is None
    spent.waiting = INTERVAL / 2
    report = watch.report_if_due(spent)
    assert report is not None
    assert report.wait_share == 0.5
