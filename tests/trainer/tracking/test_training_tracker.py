"""The metrics of a step in MLflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.distributed.step_sync import StepTotals
from trainer.monitoring.metric_names import LOSS_MEAN
from trainer.monitoring.throughput import ThroughputMeter
from trainer.tracking.training_tracker import TrainingTracker


class Recorded:
    """Replaces `MlflowTracker` and keeps the metrics by step."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, float]] = {}

    def record_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.steps[step] = dict(values)


def test_the_mean_loss_is_over_the_last_100_finite_steps() -> None:
    recorded: Any = Recorded()
    tracker = TrainingTracker(recorded, Path("checkpoints"), total_steps=150, every_steps=10)
    meter = ThroughputMeter(device=torch.device("cpu"))
    for step in range(150):
        loss = float("nan") if step in (0, 70) else float(step)
        totals = StepTotals(step, loss, "0" * 16, 8, 0, 0, 0, False, 0)
        tracker.record_step(totals, meter, epoch=0.0, learning_rate=1e-3, gradient_norm=1.0, quarantined=0)
    assert LOSS_MEAN not in recorded.steps[1]  # no step had a loss
    assert recorded.steps[20][LOSS_MEAN] == pytest.approx(sum(range(1, 20)) / 19)
    assert recorded.steps[150][LOSS_MEAN] == pytest.approx((sum(range(50, 150)) - 70) / 99)
    assert list(recorded.steps) == [1, *range(10, 151, 10)]
