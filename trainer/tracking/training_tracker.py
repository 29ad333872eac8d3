"""What of a training goes to MLflow, and when: metrics by step, evaluations, checkpoints as logged models."""

import json
import math
from collections import deque
from collections.abc import Mapping
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


class TrainingTracker:
    """Rank 0's. A step has one line in the spool at most, and most steps have none."""

    def __init__(
        self,
        tracker: MlflowTracker,
        checkpoints: Path,
        *,
        total_steps: int,
        every_steps: int,
        best: float | None,
    ) -> None:
        """
        Args:
            tracker: of the run.
            checkpoints: the folder of the run's checkpoints.
            total_steps: of the whole training.
            every_steps: optimiser steps between two records of the training's metrics.
            best: the highest top-1 of earlier starts; None where nothing was evaluated yet.
        """
        self._tracker = tracker
        self._checkpoints = checkpoints
        self._total_steps = total_steps
        self._every_steps = every_steps
        self._best = best
        self._losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self._untracked: tuple[int, dict[str, float]] | None = None  # of the last step, where it was not due
        self._evaluated: tuple[int, dict[str, float]] = (-1, {})
        self._saved = -1  # step of the newest checkpoint
        self._kept: list[str] = []
        self._limit = ""
        self._has_table = False
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
        """Record a finished step if it is due: the first, the last, and every so many."""
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
        if done % self._every_steps == 0 or done in (1, self._total_steps):
            self._track_step()

    def _track_step(self) -> None:
        if self._untracked is not None:
            self._tracker.record_metrics(*self._untracked)
            self._untracked = None

    def record_spike(self, step: int, deviations: float) -> None:
        """Record a jump of the loss, in standard deviations of what was usual."""
        self._tracker.record_metrics(step, {f"{TRAIN}spike": deviations})

    def record_skipped_step(self, step: int) -> None:
        """Record a step that changed nothing."""
        self._tracker.record_metrics(step, {f"{TRAIN}skipped": 1.0})

    def record_data_times(self, step: int, milliseconds: Mapping[str, float], limit: str) -> None:
        """Record what a clip costs in each stage, and which stage limits: a tag, since it is no number."""
        self._tracker.record_metrics(
            step, {f"{WALL_CLOCK}data_{name}_ms": value for name, value in milliseconds.items()}
        )
        if limit != self._limit:
            self._tracker.set_tags({"limiting_stage": limit})
            self._limit = limit

    def record_evaluation(self, step: int, values: Mapping[str, float], table: Path, picture: Path) -> None:
        """Record an evaluation after `step` steps, which may be the best so far.

        Args:
            values: `top1` among them.
            table: the accuracy of each class, see `confusion.class_table`.
            picture: of the confusion matrix.
        """
        found = {f"{VAL}{name}": value for name, value in values.items()}
        if values["top1"] > (-1.0 if self._best is None else self._best):  # NaN is not
            self._best = values["top1"]
            found_best = {f"{BEST}{name}": value for name, value in values.items()}
        else:
            found_best = {}
        self._tracker.record_metrics(step, {**found, **found_best})
        self._evaluated = step, found
        if self._saved == step:
            self._tracker.record_checkpoint(self._folder_of(step), step, found)
        self._tracker.upload_artifact(picture)
        self._tracker.upload_artifact(table)
        if not self._has_table:
            shown = [{"path": table.name, "type": "table"}]
            self._tracker.set_tags({"mlflow.loggedArtifacts": json.dumps(shown)})
            self._has_table = True

    def record_reevaluation(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Record an evaluation of a finished run. prefix: of its metrics (`evaluation/finished_run.py`)."""
        self._tracker.record_metrics(step, {f"{prefix}{name}": value for name, value in values.items()})

    def record_checkpoint(self, step: int, path: Path) -> None:
        """Record a checkpoint, and which of the earlier ones are still there."""
        self._saved = step
        evaluated, values = self._evaluated
        self._tracker.record_checkpoint(path, step, values if evaluated == step else {})
        self._track_kept()

    def _track_kept(self) -> None:
        kept = sorted(path.name for path in self._checkpoints.glob("step-*") if path.is_dir())
        if kept != self._kept:
            self._tracker.record_kept_checkpoints(kept)
            self._kept = kept

    def upload_examples(self, sheet: Path) -> None:
        """Record a picture of some validation videos with their classes."""
        self._tracker.upload_artifact(sheet)

    def register_weights(self, weights: Path, registered: str) -> None:
        """Make the final weights a version of a registered model. registered: `NAME` or `NAME@ALIAS`."""
        name, _, alias = registered.partition("@")
        self._tracker.register_weights(
            self._folder_of(self._total_steps),
            self._total_steps,
            {},  # the evaluation has given the model its metrics
            weights=weights,
            name=name,
            alias=alias or None,
        )

    def _folder_of(self, step: int) -> Path:
        return self._checkpoints / f"step-{step:07d}"

    def record_summary(self, summary: Mapping[str, Any], file: Path) -> None:
        """Record what the run came to. file: with the same."""
        numbers = {name: value for name, value in summary.items() if isinstance(value, int | float)}
        # MLflow draws a metric that has step 0 alone as bars, one for each run.
        self._tracker.record_metrics(0, {f"{WHOLE_RUN}{name}": value for name, value in numbers.items()})
        self._seconds = summary["seconds"]
        self._tracker.upload_artifact(file)

    def close(self, status: Status, timeout: float) -> None:
        """End the MLflow run, waiting so many seconds at most for what is still on its way.

        The last step is recorded there, too: a run that stops or fails ends between two records.
        """
        self._track_step()
        if self._saved >= 0:
            self._track_kept()
        self._tracker.close(status, timeout, self._seconds)
