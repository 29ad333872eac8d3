"""The MLflow records of a training: metrics by step, evaluations, checkpoints as logged models."""

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.distributed.step_sync import StepTotals
from trainer.monitoring.metric_names import (
    BEST,
    LOSS_MEAN,
    LOSS_STEPS,
    SYSTEM,
    TRAIN,
    VAL,
    VIDEOS,
    WALL_CLOCK,
    WHOLE_RUN,
)
from trainer.monitoring.throughput import ThroughputMeter
from trainer.tracking.mlflow_tracker import MlflowTracker, Status


@dataclass
class TrainingTracker:
    """Used on rank 0. A step adds at most one line to the outbox; most steps add none."""

    tracker: MlflowTracker
    checkpoints: Path
    """The folder of the run's checkpoints."""
    total_steps: int
    """Of the whole training."""
    every_steps: int
    """Steps between two records of the training metrics."""

    def __post_init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self._untracked: tuple[int, dict[str, float]] | None = None  # of the last step, if not recorded
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._saved = -1  # step of the newest checkpoint
        self._kept: list[str] = []
        self._seconds: float | None = None

    def record_step(
        self,
        totals: StepTotals,
        meter: ThroughputMeter,
        *,
        epoch: float,
        learning_rate: float,
        gradient_norm: float | None,
        quarantined: int,
    ) -> None:
        """Record the metrics of the first, the last and every `every_steps`-th step."""
        done, rates, spent = totals.step + 1, meter.rates(), meter.spent
        self._seconds = spent.seconds
        self._losses.append(totals.loss)
        losses = [loss for loss in self._losses if math.isfinite(loss)]
        values = {
            f"{TRAIN}loss": totals.loss,
            LOSS_MEAN: sum(losses) / len(losses) if losses else None,
            f"{TRAIN}learning_rate": learning_rate,
            f"{TRAIN}gradient_norm": gradient_norm,
            f"{VIDEOS}epoch": epoch,
            f"{VIDEOS}bad_clips": totals.bad,
            f"{VIDEOS}quarantined": quarantined,
            f"{WALL_CLOCK}step": done,
            f"{WALL_CLOCK}seconds_per_step": rates.seconds_per_step,
            f"{WALL_CLOCK}clips_per_second": rates.clips_per_second,
            f"{WALL_CLOCK}data_wait_share": rates.data_wait_share,
            f"{WALL_CLOCK}mfu": rates.mfu,
            f"{WALL_CLOCK}tflops_per_device": rates.tflops_per_device,
            f"{WALL_CLOCK}checkpoint_pause_seconds": spent.saving,
            f"{WALL_CLOCK}ettr": spent.ettr,
            f"{WALL_CLOCK}hours": spent.seconds / 3600,
            f"{WALL_CLOCK}gpu_hours": meter.device_seconds / 3600,
            f"{SYSTEM}memory_peak_gib": rates.memory_peak / 2**30,
        }
        self._untracked = done, {name: value for name, value in values.items() if value is not None}
        if done % self.every_steps == 0 or done in (1, self.total_steps):
            self._track_step()

    def _track_step(self) -> None:
        if self._untracked is not None:
            self.tracker.record_metrics(*self._untracked)
            self._untracked = None

    def record_evaluation(
        self, step: int, values: Mapping[str, float], table: Path, picture: Path, *, is_best: bool
    ) -> None:
        """Record an evaluation after `step` steps, also under `best/` if it is the best so far.

        Args:
            values: metrics, including `top1`.
            table: file with the accuracy of each class.
            picture: file with the confusion matrix.
        """
        found = {f"{VAL}{name}": value for name, value in values.items()}
        best = {f"{BEST}{name}": value for name, value in values.items()} if is_best else {}
        self.tracker.record_metrics(step, {**found, **best})
        self._evaluated = step, found
        if self._saved == step:
            self.tracker.record_checkpoint(self._folder_of(step), step, found)
        self.tracker.upload_artifact(picture)
        self.tracker.upload_artifact(table)
        shown = [{"path": table.name, "type": "table"}]
        self.tracker.set_tags({"mlflow.loggedArtifacts": json.dumps(shown)})

    def record_checkpoint(self, step: int, path: Path) -> None:
        """Record a checkpoint, and delete the logged models of deleted checkpoints."""
        self._saved = step
        evaluated, values = self._evaluated
        self.tracker.record_checkpoint(path, step, values if evaluated == step else {})
        self._track_kept()

    def _track_kept(self) -> None:
        kept = sorted(path.name for path in self.checkpoints.glob("step-*") if path.is_dir())
        if kept != self._kept:
            self.tracker.record_kept_checkpoints(kept)
            self._kept = kept

    def register_weights(self, weights: Path, registered: str) -> None:
        """Make the final weights a version of a registered model. registered: `NAME` or `NAME@ALIAS`."""
        name, _, alias = registered.partition("@")
        self.tracker.register_weights(
            self._folder_of(self.total_steps),
            self.total_steps,
            {},  # the model has its metrics from the evaluation
            weights=weights,
            name=name,
            alias=alias or None,
        )

    def _folder_of(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:07d}"

    def record_summary(self, summary: Mapping[str, Any], file: Path) -> None:
        """Record the numbers of the run's summary and upload `summary.json`, its file."""
        numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        # MLflow draws a metric whose only step is 0 as one bar per run.
        self.tracker.record_metrics(0, {f"{WHOLE_RUN}{name}": value for name, value in numbers.items()})
        self._seconds = summary["seconds"]
        self.tracker.upload_artifact(file)

    def close(self, status: Status, timeout: float) -> None:
        """Record the last step and the status, and wait up to `timeout` seconds for the upload.

        A run that is stopped or fails usually ends between two recorded steps.
        """
        self._track_step()
        if self._saved >= 0:
            self._track_kept()
        self.tracker.close(status, timeout, self._seconds)
