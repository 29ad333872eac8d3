"""The run logger: rank 0 writes events, MLflow records and the console; the other ranks send their data."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from pipelines.bad_samples import BadSample, BadSamples
from pipelines.dataset.concat import Dataset
from trainer.distributed.async_copy import AsyncCopy
from trainer.distributed.step_sync import StepTotals
from trainer.errors import RunError
from trainer.evaluation.confusion_matrix import CLASS_TABLE, class_table, draw_confusion
from trainer.evaluation.example_sheet import EXAMPLES, write_examples
from trainer.evaluation.finished_run import Reevaluation
from trainer.evaluation.multi_view import EvaluationResult
from trainer.monitoring.console import Display
from trainer.monitoring.data_bottleneck import DataReport
from trainer.monitoring.loss_spikes import LossSpikeDetector
from trainer.monitoring.run_dir import RunDir
from trainer.monitoring.throughput import ThroughputMeter
from trainer.system.files import write_json
from trainer.system.formatting import format_duration, format_percent
from trainer.tracking.mlflow_tracker import MlflowTracker, Status
from trainer.tracking.training_tracker import TrainingTracker


class RunLogger:
    """folder, tracker: of the run; used on rank 0 only. every_steps: between two records in MLflow. again:
    how a finished run is evaluated again, which leaves its events and results as they are.
    """

    def __init__(
        self,
        folder: RunDir,
        tracker: MlflowTracker,
        display: Display,
        *,
        total_steps: int,
        every_steps: int,
        class_names: tuple[str, ...],
        best: float | None,
        again: Reevaluation | None = None,
    ) -> None:
        self._folder = folder
        self._how_to_see = tracker.how_to_see
        self._tracker = TrainingTracker(
            tracker, folder.checkpoints, total_steps=total_steps, every_steps=every_steps, best=best
        )
        self._display = display
        self._total_steps = total_steps
        self._class_names = class_names
        self._again = again
        self._is_main = dist.get_rank() == 0
        self._spikes = LossSpikeDetector()
        self._best = best
        self._loss_sum, self._loss_steps = 0.0, 0  # of the steps since the evaluation before
        self._launched: dict[int, tuple[float, AsyncCopy | float | None]] = {}
        self._quarantined = len(folder.read_quarantined()) if self._is_main else 0

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
        self._folder.append_event(
            "step",
            step=done,
            total_steps=self._total_steps,
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
            quarantined=self._quarantined,
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
            quarantined=self._quarantined,
        )
        self._display.step(
            done,
            epoch=epoch,
            loss=totals.loss,
            learning_rate=learning_rate,
            rates=rates,
            seconds_left=meter.time_left(self._total_steps - done),
        )

    def _mark_spike(self, done: int, loss: float) -> None:
        spike = self._spikes.detect(loss)
        if spike is None:
            return
        self._folder.append_event(
            "spike", step=done, loss=loss, usual=spike.usual, deviations=spike.deviations
        )
        self._tracker.record_spike(done, spike.deviations)
        self._display.warn(
            f"step {done}: the loss jumps to {loss:.4f}; {spike.usual:.4f} was usual ({spike.deviations:.0f} "
            "standard deviations)"
        )

    def log_skipped_step(self, step: int, words: str, file: Path | None) -> None:
        """Log a skipped step and the file for its replay."""
        if self._is_main:
            self._folder.append_event(
                "skipped", step=step + 1, words=words, file=None if file is None else str(file)
            )
            self._tracker.record_skipped_step(step + 1)
            self._display.warn(words)

    def log_data_cost(self, step: int, report: DataReport | None) -> None:
        """Log the cost of data; print it if another stage limits than before."""
        if not self._is_main or report is None:
            return
        done = step + 1
        costs = {f"{name}_ms": round(value, 3) for name, value in report.milliseconds.items()}
        self._folder.append_event("data", step=done, limit=report.limit.stage, **costs)
        self._tracker.record_data_times(done, report.milliseconds, report.limit.stage)
        if report.changed:
            self._display.note(report.message)

    def log_evaluation_progress(self, batches: int) -> Callable[[int], None]:
        """Returns a function to call with the number of evaluated batches."""
        return lambda done: self._display.evaluating(done, batches)

    def log_evaluation(self, step: int, result: EvaluationResult) -> None:
        """Log an evaluation after `step` steps, and draw its confusion matrix."""
        if not self._is_main:
            return
        values = {"top1": result.top1, "top5": result.top5, "loss": result.loss, "ece": result.ece}
        again = self._again
        event: dict[str, Any] = {"step": step, "videos": result.videos, "bad": result.bad, **values}
        if again is None:
            self._folder.append_event("evaluation", **event)
        else:
            self._folder.append_event("re-evaluation", **event, **again.settings)
        self._display.note(self._in_words(step, result))
        if again is not None:
            self._tracker.record_reevaluation(step, values, again.metrics)
            return
        title = f"step {step}, top-1 {format_percent(result.top1, 1)}"
        with self._folder.best_effort(self._folder.confusion):
            draw_confusion(self._folder.confusion, result.confusion, self._class_names, title)
        table = self._folder.path / CLASS_TABLE
        with self._folder.best_effort(table):
            write_json(table, class_table(result.confusion, self._class_names))
        self._tracker.record_evaluation(step, values, table, self._folder.confusion)

    def _in_words(self, step: int, result: EvaluationResult) -> str:
        trained = f", training loss {self._loss_sum / self._loss_steps:.4f}" if self._loss_steps else ""
        self._loss_sum, self._loss_steps = 0.0, 0
        before, best = self._best, ""
        if result.videos and (before is None or result.top1 > before):
            self._best = result.top1
            if before is not None:
                best = f"; the best so far, {format_percent(before)} before"
        elif before is not None:
            best = f"; the best so far is {format_percent(before)}"
        accuracy = f"top-1 {format_percent(result.top1)}, top-5 {format_percent(result.top5)}"
        bad = f", {result.bad} could not be read" if result.bad else ""
        measured = f"{accuracy}, loss {result.loss:.4f} of {result.videos} videos{bad}"
        return f"evaluation after step {step}: {measured}{trained}{best}"

    def log_checkpoint(self, step: int, path: Path, seconds: float) -> None:
        """Log a complete checkpoint. seconds: since the save began."""
        if self._is_main:
            self._folder.append_event("checkpoint", step=step, path=str(path), seconds=round(seconds, 3))
            self._tracker.record_checkpoint(step, path)
            self._display.note(f"checkpoint after step {step}: {path}")

    def quarantine_bad_samples(self, bad_samples: BadSamples) -> list[BadSample]:
        """Add the new bad samples of all ranks to the quarantine. Collective; all ranks get all of them."""
        gathered: list[list[BadSample]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, bad_samples.pop_new())
        found = [defect for part in gathered for defect in part]
        if self._is_main:
            fresh = self._folder.add_to_quarantine(map(asdict, found))
            self._quarantined += len(fresh)
            for entry in fresh:
                self._display.warn(f"bad video, left out: {entry['path']} {entry['reason']}")
                self._folder.append_event("quarantine", **entry)
        return found

    @property
    def quarantined(self) -> int:
        """Videos in quarantine so far, on rank 0; 0 on the others."""
        return self._quarantined

    @property
    def quarantine_file(self) -> Path:
        return self._folder.quarantine

    def log_start(self, text: str, **values: Any) -> None:
        """Log the start of an attempt."""
        if self._is_main:
            if self._again is None:
                self._folder.append_event("start", **values)
            self._display.note(text)

    def log_note(self, text: str) -> None:
        """Print a line."""
        if self._is_main:
            self._display.note(text)

    def log_warning(self, text: str) -> None:
        """Print a warning."""
        if self._is_main:
            self._display.warn(text)

    def log_stop(self, step: int, reason: str, seconds: float, unsaved: str | None = None) -> None:
        """Log a stop before the end. unsaved: the latest checkpoint, if this step was not saved."""
        if not self._is_main:
            return
        if self._again is not None:
            self._display.note(f"stopped by {reason}: the run had ended before, and is as it was")
            return
        self._folder.append_event("left", step=step, reason=reason)
        where = f"stopped by {reason} after step {step} of {self._total_steps}, {format_duration(seconds)} in"
        if unsaved is None:
            self._display.note(f"{where}. All is saved: give the same command again to continue")
        else:
            self._display.warn(
                f"{where}. The numbers of that step were not finite, so that its weights are not saved; "
                f"{unsaved}. The same command resumes the run"
            )

    def log_failure(self, step: int, words: str) -> None:
        """Log an error that ends the run after `step` steps."""
        if self._is_main and self._again is None:
            self._folder.append_event("failed", step=step, words=words)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary. Raises RunError if it cannot be written: without it the run has not ended."""
        if not self._is_main:
            return
        try:
            write_json(self._folder.summary, summary)
        except OSError as error:
            raise RunError(
                f"{self._folder.summary} cannot be written: {error.strerror}; correct this and start "
                "again, and the last checkpoint is evaluated once more"
            ) from error
        self._folder.append_event("end", **summary)
        self._tracker.record_summary(summary, self._folder.summary)

    def log_examples(self, videos: Dataset) -> None:
        """Show some validation videos with their true and predicted classes, from the scores of the last
        evaluation. On rank 0. videos: of the evaluation.
        """
        sheet = self._folder.path / EXAMPLES
        try:
            write_examples(sheet, self._folder.scores, videos)
        except RunError as error:
            self.log_warning(f"{EXAMPLES} is missing: {error}")
        else:
            self._tracker.upload_examples(sheet)

    def register_weights(self, registered: str) -> None:
        """Have the final weights registered with MLflow. registered: `NAME` or `NAME@ALIAS`."""
        if self._is_main:
            self._tracker.register_weights(self._folder.weights, registered)

    def print_summary(self) -> None:
        """Print the summary."""
        if self._is_main:
            summary = json.loads(self._folder.summary.read_text(encoding="utf-8"))
            self._display.summary(summary, self._folder.path, self._how_to_see())

    def close(self, status: Status, timeout: float) -> None:
        """End the MLflow run. timeout: seconds to wait for the outbox."""
        if self._is_main:
            self._tracker.close(status, timeout)
