"""The run logger: rank 0 writes events, MLflow records and the console; the other ranks send their data."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipelines.bad_samples import BadSample, BadSamples
from pipelines.dataset.concat import Dataset
from trainer.distributed.async_copy import AsyncCopy
from trainer.distributed.collectives import gather
from trainer.distributed.step_sync import StepTotals
from trainer.errors import RunError
from trainer.evaluation.confusion_matrix import CLASS_TABLE, class_table, draw_confusion
from trainer.evaluation.example_sheet import EXAMPLES, write_examples
from trainer.evaluation.finished_run import Reevaluation
from trainer.evaluation.multi_view import EvaluationResult
from trainer.monitoring.console import Display
from trainer.monitoring.data_bottleneck import DataReport
from trainer.monitoring.loss_spikes import LossSpikeDetector
from trainer.monitoring.metric_names import TRAIN, WALL_CLOCK
from trainer.monitoring.run_dir import RunDir
from trainer.monitoring.throughput import ThroughputMeter
from trainer.system.files import write_json
from trainer.system.formatting import format_duration, format_percent
from trainer.tracking.mlflow_tracker import MlflowTracker, Status
from trainer.tracking.training_tracker import TrainingTracker


@dataclass
class RunLogger:
    """Logs a run; folder and MLflow are used on rank 0 only."""

    folder: RunDir
    mlflow: MlflowTracker
    display: Display
    total_steps: int
    every_steps: int
    """Steps between two records in MLflow."""
    class_names: tuple[str, ...]
    best: float | None
    """The highest top-1 so far; None before the first evaluation."""
    again: Reevaluation | None
    """How a finished run is evaluated again, which leaves its events and results as they are."""

    def __post_init__(self) -> None:
        self._tracker = TrainingTracker(
            self.mlflow, self.folder.checkpoints, self.total_steps, self.every_steps
        )
        self._is_main = dist.get_rank() == 0
        self._spikes = LossSpikeDetector()
        self._loss_sum, self._loss_steps = 0.0, 0  # of the steps since the evaluation before
        self._launched: dict[int, tuple[float, AsyncCopy | float | None]] = {}
        # Videos in quarantine so far, on rank 0; 0 on the others.
        self.quarantined = len(self.folder.read_quarantined()) if self._is_main else 0

    def log_launch(self, step: int, learning_rate: float, gradient_norm: Tensor | float | None) -> None:
        """Store a step's learning rate and gradient norm until its totals are known."""
        if self._is_main:
            norm = AsyncCopy(gradient_norm) if isinstance(gradient_norm, Tensor) else gradient_norm
            self._launched[step] = (learning_rate, norm)

    def log_step(self, totals: StepTotals, meter: ThroughputMeter, epoch: float) -> None:
        """Log a finished step, counted from 1."""
        if not self._is_main:
            return
        learning_rate, norm = self._launched.pop(totals.step)
        done = totals.step + 1
        rates = meter.rates()
        gradient_norm = float(norm.values()) if isinstance(norm, AsyncCopy) else norm
        self.folder.append_event(
            "step",
            step=done,
            total_steps=self.total_steps,
            starts=meter.spent.starts,
            loss=totals.loss,
            batch_hash=totals.batch_hash,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            clips_per_second=round(rates.clips_per_second, 3),
            data_wait_share=round(rates.data_wait_share, 4),
            bad_clips=totals.bad,
            spent=round(meter.spent.seconds, 3),
            device_seconds=round(meter.device_seconds, 3),
            mfu=rates.mfu,
            quarantined=self.quarantined,
        )
        self._mark_spike(done, totals.loss)
        if math.isfinite(totals.loss):  # one that is not would hide all others in the mean
            self._loss_sum += totals.loss
            self._loss_steps += 1
        self._tracker.record_step(
            totals,
            meter,
            epoch=epoch,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            quarantined=self.quarantined,
        )
        self.display.step(
            done,
            epoch=epoch,
            loss=totals.loss,
            learning_rate=learning_rate,
            rates=rates,
            seconds_left=meter.time_left(self.total_steps - done),
        )

    def _mark_spike(self, done: int, loss: float) -> None:
        spike = self._spikes.detect(loss)
        if spike is None:
            return
        self.folder.append_event(
            "spike", step=done, loss=loss, usual=spike.usual, deviations=spike.deviations
        )
        self.mlflow.record_metrics(done, {f"{TRAIN}spike": spike.deviations})
        self.display.warn(
            f"step {done}: the loss jumps to {loss:.4f}; {spike.usual:.4f} was usual ({spike.deviations:.0f} "
            "standard deviations)"
        )

    def log_skipped_step(self, step: int, words: str, file: Path | None) -> None:
        """Log a skipped step and the file for its replay."""
        if self._is_main:
            self.folder.append_event(
                "skipped", step=step + 1, words=words, file=None if file is None else str(file)
            )
            self.mlflow.record_metrics(step + 1, {f"{TRAIN}skipped": 1.0})
            self.display.warn(words)

    def log_data_cost(self, step: int, report: DataReport | None) -> None:
        """Log the cost of data; print it if another stage limits than before."""
        if not self._is_main or report is None:
            return
        done = step + 1
        costs = {f"{name}_ms": value for name, value in report.milliseconds.items()}
        rounded = {name: round(value, 3) for name, value in costs.items()}
        self.folder.append_event("data", step=done, limit=report.limit.stage, **rounded)
        self.mlflow.record_metrics(done, {f"{WALL_CLOCK}data_{name}": value for name, value in costs.items()})
        if report.changed:
            self.mlflow.set_tags({"limiting_stage": report.limit.stage})
            self.display.note(report.message)

    def log_evaluation_progress(self, batches: int) -> Callable[[int], None]:
        """Returns a function to call with the number of evaluated batches."""
        return lambda done: self.display.evaluating(done, batches)

    def log_evaluation(self, step: int, result: EvaluationResult) -> None:
        """Log an evaluation after `step` steps, and draw its confusion matrix."""
        if not self._is_main:
            return
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss, "ece": result.ece}
        again = self.again
        event: dict[str, Any] = {"step": step, "videos": result.videos, "bad": result.bad, **values}
        if again is None:
            self.folder.append_event("evaluation", **event)
        else:
            self.folder.append_event("re-evaluation", **event, **again.settings)
        before = self.best
        is_best = result.videos > 0 and (before is None or result.top1 > before)
        self.display.note(self._in_words(step, result, is_best))
        self.best = result.top1 if is_best else before
        if again is not None:
            self.mlflow.record_metrics(step, {f"{again.metrics}{name}": v for name, v in values.items()})
            return
        title = f"step {step}, top-1 {format_percent(result.top1, 1)}"
        with self.folder.best_effort(self.folder.confusion):
            draw_confusion(self.folder.confusion, result.confusion, self.class_names, title)
        table = self.folder.path / CLASS_TABLE
        with self.folder.best_effort(table):
            write_json(table, class_table(result.confusion, self.class_names))
        self._tracker.record_evaluation(step, values, table, self.folder.confusion, is_best=is_best)

    def _in_words(self, step: int, result: EvaluationResult, is_best: bool) -> str:
        trained = f", training loss {self._loss_sum / self._loss_steps:.4f}" if self._loss_steps else ""
        self._loss_sum, self._loss_steps = 0.0, 0
        best = ""
        if self.best is not None:
            known = format_percent(self.best)
            best = f"; the best so far, {known} before" if is_best else f"; the best so far is {known}"
        accuracy = f"top-1 {format_percent(result.top1)}, top-5 {format_percent(result.top5)}"
        bad = f", {result.bad} could not be read" if result.bad else ""
        measured = f"{accuracy}, loss {result.loss:.4f} of {result.videos} videos{bad}"
        return f"evaluation after step {step}: {measured}{trained}{best}"

    def log_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Log a complete checkpoint. seconds: since the save began."""
        if self._is_main:
            self.folder.append_event("checkpoint", step=step, path=str(path), seconds=round(seconds, 3))
            self._tracker.record_checkpoint(step, path)
            self.display.note(f"checkpoint after step {step}: {path}")

    def quarantine_bad_samples(self, bad_samples: BadSamples) -> list[BadSample]:
        """Add the new bad samples of all ranks to the quarantine. Collective; all ranks get all of them."""
        found = [defect for part in gather(bad_samples.pop_new()) for defect in part]
        if self._is_main:
            fresh = self.folder.add_to_quarantine(map(asdict, found))
            self.quarantined += len(fresh)
            for entry in fresh:
                self.display.warn(f"bad video, left out: {entry['path']} {entry['reason']}")
                self.folder.append_event("quarantine", **entry)
        return found

    def log_start(self, text: str, **values: Any) -> None:
        """Log the start of an attempt."""
        if self._is_main:
            if self.again is None:
                self.folder.append_event("start", **values)
            self.display.note(text)

    def log_starting_weights(
        self, file: str, report: Sequence[str], names: Mapping[str, Sequence[str]]
    ) -> None:
        """Print how a file of weights is loaded, and log the names of all tensors. names: by their fate."""
        if self._is_main:
            self.folder.append_event("starting weights", file=file, **names)
            for line in report:
                self.display.note(line)

    def log_note(self, text: str) -> None:
        """Print a line."""
        if self._is_main:
            self.display.note(text)

    def log_warning(self, text: str) -> None:
        """Print a warning."""
        if self._is_main:
            self.display.warn(text)

    def log_stop(self, step: int, reason: str, seconds: float, unsaved: str | None = None) -> None:
        """Log a stop before the end. unsaved: the latest checkpoint, if this step was not saved."""
        if not self._is_main:
            return
        if self.again is not None:
            self.display.note(f"stopped by {reason}: the run had ended before, and is as it was")
            return
        self.folder.append_event("left", step=step, reason=reason)
        where = f"stopped by {reason} after step {step} of {self.total_steps}, {format_duration(seconds)} in"
        if unsaved is None:
            self.display.note(f"{where}. All is saved: give the same command again to continue")
        else:
            self.display.warn(
                f"{where}. The numbers of that step were not finite, so that its weights are not saved; "
                f"{unsaved}. The same command resumes the run"
            )

    def log_failure(self, step: int, words: str) -> None:
        """Log an error that ends the run after `step` steps."""
        if self._is_main and self.again is None:
            self.folder.append_event("failed", step=step, words=words)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary. Raises RunError if it cannot be written: without it the run has not ended."""
        if not self._is_main:
            return
        try:
            write_json(self.folder.summary, summary)
        except OSError as error:
            raise RunError(
                f"{self.folder.summary} cannot be written: {error.strerror}; correct this and start "
                "again, and the last checkpoint is evaluated once more"
            ) from error
        self.folder.append_event("end", **summary)
        self._tracker.record_summary(summary, self.folder.summary)

    def log_examples(self, videos: Dataset) -> None:
        """Show some validation videos with their true and predicted classes, from the scores of the last
        evaluation. On rank 0. videos: of the evaluation.
        """
        sheet = self.folder.path / EXAMPLES
        try:
            write_examples(sheet, self.folder.scores, videos)
        except RunError as error:
            self.log_warning(f"{EXAMPLES} is missing: {error}")
        else:
            self.mlflow.upload_artifact(sheet)

    def register_weights(self, registered: str) -> None:
        """Have the final weights registered with MLflow. registered: `NAME` or `NAME@ALIAS`."""
        if self._is_main:
            self._tracker.register_weights(self.folder.weights, registered)

    def print_summary(self) -> None:
        """Print the summary."""
        if self._is_main:
            summary = json.loads(self.folder.summary.read_text(encoding="utf-8"))
            self.display.summary(summary, self.folder.path, self.mlflow.how_to_see())

    def close(self, status: Status, timeout: float) -> None:
        """End the MLflow run. timeout: seconds to wait for the outbox."""
        if self._is_main:
            self._tracker.close(status, timeout)
