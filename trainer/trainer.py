"""The training loop."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from pipelines.loader import ClipBatch, ClipLoader
from pipelines.sampling.sampler import TrainSampler
from trainer.checkpoint.checkpointer import Checkpointer, Saved
from trainer.checkpoint.metadata import Progress
from trainer.distributed.step_sync import StepSums, StepSync, StepTotals
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import AgreedError, RunError
from trainer.evaluation.multi_view import NotFiniteError
from trainer.loss import masked_cross_entropy, propagate_nonfinite
from trainer.lr_schedule import Schedule
from trainer.monitoring.data_bottleneck import DataBottleneckMonitor
from trainer.monitoring.throughput import ThroughputMeter
from trainer.resilience.nonfinite import NonfiniteDiagnosis, SkippedSteps
from trainer.resilience.process_identity import process_age
from trainer.resilience.signals import StopRequest
from trainer.resilience.watchdog import Watchdog
from trainer.run_logger import RunLogger
from trainer.setup.bad_video_limit import BadClipLimit
from trainer.system.garbage_collection import PlannedCollection
from trainer.validation import Validator


@dataclass
class Trainer:
    """The parts of a training, and the loop over its steps. All ranks call every method at the same step."""

    engine: Engine
    sampler: TrainSampler
    schedule: Schedule
    train_loader: ClipLoader
    step_sync: StepSync
    bad_clips: BadClipLimit
    diagnosis: NonfiniteDiagnosis
    skipped: SkippedSteps
    checkpointer: Checkpointer
    validator: Validator
    run_logger: RunLogger
    meter: ThroughputMeter
    data_monitor: DataBottleneckMonitor
    stop: StopRequest
    watchdog: Watchdog
    garbage: PlannedCollection = field(default_factory=PlannedCollection)
    label_smoothing: float = 0.0
    step: int = 0
    """Optimiser steps done."""
    misses_evaluation: bool = False
    """Whether the evaluation after this step is still to be made, as an earlier attempt stopped before it."""
    is_finite: bool = True
    """Whether the gradient of the latest step was finite; nothing is saved while it was not."""

    def fit(self) -> bool:
        """Train to the last step. Returns False where a rank was asked to stop before.

        Raises AgreedError where the weights have become useless: too many steps were not finite, the last one
        was not, or the model's outputs for the validation videos are not.
        """
        with self.garbage:
            return self._fit()

    def _fit(self) -> bool:
        batches = iter(self.train_loader)
        self.engine.train()
        self.meter.record_startup(process_age())
        if self.misses_evaluation and not self.evaluate():
            return False
        while self.step < self.schedule.total_steps:
            with self.meter.step(self.sampler.global_batch):
                totals = self.exchange(self.train_step(batches))
            self.step += 1
            self.garbage.collect_after(self.step)
            self.watchdog.beat(f"step {self.step}")
            if totals is not None:
                self.record(totals)
            if totals is not None and totals.stop_requests:
                break
            if self.schedule.saves_after(self.step) or (totals is not None and totals.save_due):
                self.save()
            if self.schedule.evaluates_after(self.step) and not self.evaluate():
                break
        self.finish_saving()
        if self.step < self.schedule.total_steps:
            return False
        if not self.is_finite:
            raise AgreedError(
                f"the last step, {self.step}, changed nothing, because its numbers were not finite: whether "
                "the weights are good is not known, and they are not saved; "
                f"{self.checkpointer.describe_newest()}. uniformerv2 export writes a checkpoint's weights; "
                "lower optimisation.learning_rate to train on"
            )
        return not self.schedule.evaluates_at_end or self.evaluate()

    def train_step(self, batches: Iterator[ClipBatch]) -> StepSums:
        """One optimiser step over all micro-batches. Returns this rank's sums."""
        loss_sum = torch.zeros((), device=self.engine.device)
        batch_hash = torch.zeros((), dtype=torch.int64, device=self.engine.device)
        rate = self.schedule.learning_rate(self.step)
        for number in range(self.engine.accumulation):
            with self.meter.time("waiting"):
                batch = next(batches)
            batch_hash += batch.hash()
            logits = self.engine.forward(batch.clips, batch.keys)
            losses = masked_cross_entropy(
                logits, batch.labels, batch.valid, batch.mixed, self.label_smoothing
            )
            # The denominator counts bad clips too: no rank needs the number of bad clips of the others.
            loss = propagate_nonfinite(losses.sum())
            self.diagnosis.hold(self.step, number, batch, loss)
            self.engine.backward(loss / self.engine.micro_batch)
            if number == self.engine.accumulation - 1:
                self.finish_previous_step()  # the weights are still those of its diagnosis
            self.engine.step(rate)
            loss_sum += losses.detach().sum()
        self.run_logger.log_launch(self.step, rate, self.engine.gradient_norm())
        return StepSums(loss_sum, batch_hash)

    def finish_previous_step(self) -> None:
        """Confirm or withdraw the weights of the step before, by its gradient. Waits for that step only."""
        is_finite = self.engine.finish_step()
        if is_finite is None:
            return
        self.is_finite = is_finite
        if is_finite:
            self.checkpointer.confirm(self.step - 1)  # the weights from which its gradient was computed
        else:
            self.report_skipped(self.step - 1)

    def report_skipped(self, step: int) -> None:
        """Find out why this step was not finite, and keep its clips. Raises AgreedError for one too many."""
        # The cause may be weights that were saved and never gave a finite gradient.
        self.checkpointer.withdraw(f"the gradient of step {step + 1}, which met its weights, is not finite")
        report = self.diagnosis.diagnose(step)
        try:
            message = self.skipped.add(step + 1, report.reason)
        except RunError as error:
            self.run_logger.log_skipped_step(step, str(error), report.file)
            raise AgreedError(f"{error}. {self.checkpointer.describe_newest().capitalize()}") from error
        self.run_logger.log_skipped_step(step, message, report.file)

    def exchange(self, sums: StepSums) -> StepTotals | None:
        """Start the all-reduce of this step. Returns the totals of the step before."""
        clips, bad = self.train_loader.bad_samples.pop_counts()
        return self.step_sync.exchange(
            self.step,
            sums,
            clips=clips,
            bad=bad,
            bad_samples=len(self.train_loader.bad_samples.new),
            stop_requested=self.stop.poll() is not None,
            save_due=self.checkpointer.is_due,
            writing=self.checkpointer.is_writing,
        )

    def record(self, totals: StepTotals) -> None:
        """Log a step by its totals. Raises AgreedError for too many bad clips."""
        self.log_saved(self.checkpointer.poll(totals))
        self.bad_clips.add(totals.clips, totals.bad)
        if totals.bad_samples:
            self.bad_clips.videos.add(self.run_logger.quarantine_bad_samples(self.train_loader.bad_samples))
        self.run_logger.log_step(totals, self.meter, self.sampler.epoch_of(totals.step + 1))
        self.run_logger.log_data_cost(totals.step, self.data_monitor.report_if_due(self.meter.spent))
        if self.bad_clips.is_exceeded:
            self.finish_saving()
            raise AgreedError(
                f"{self.bad_clips.describe()}. All are in {self.run_logger.folder.quarantine}. Mend them or "
                "raise data.bad_share, and start again to continue; or make the manifest anew with --deep, "
                "which leaves bad videos out, and train with another --run-dir"
            )

    def finish_pending(self) -> None:
        """Read the outcome and the totals of the latest step, if that was not done yet."""
        self.finish_previous_step()
        totals = self.step_sync.read_pending()
        if totals is not None:
            self.record(totals)

    def evaluate(self) -> bool:
        """Evaluate on all validation videos, and save the weights if they are the best so far.

        Returns False where a rank was asked to stop meanwhile. Raises AgreedError for outputs that are not
        finite or too many bad videos.
        """
        self.finish_pending()
        is_last = self.step == self.schedule.total_steps
        try:
            with self.garbage.automatic():
                result = self.validator.evaluate(self.step, writes_scores=is_last)
        except NotFiniteError:
            self.checkpointer.withdraw(f"the outputs of the evaluation after step {self.step} are not finite")
            raise
        if result is None:
            return False
        if is_last and self.is_finite and result.videos:
            self.checkpointer.confirm(self.step)  # no later step will
        if self.checkpointer.record_accuracy(self.step, result.top1):
            self.save()
        self.validator.check_bad_videos(result)
        return True

    def reevaluate(self) -> bool:
        """Evaluate a finished run, of which nothing is saved. Returns and raises as `evaluate`."""
        result = self.validator.evaluate(self.step, writes_scores=False)
        if result is None:
            return False
        self.validator.check_bad_videos(result)
        return True

    def save(self) -> None:
        """Start to save a checkpoint, or postpone it while the latest step is not finite."""
        self.finish_pending()
        if not self.is_finite:
            self.checkpointer.postpone()
            return
        with self.meter.time("saving"):
            self.log_saved(self.checkpointer.wait())
            self.checkpointer.begin(
                self.engine,
                Progress(self.step, self.bad_clips.clips, self.bad_clips.bad, self.meter.totals()),
            )

    def finish_saving(self) -> None:
        """Save the latest step and wait until it is saved, unless it was not finite.

        Raises AgreedError where it cannot be written.
        """
        self.finish_pending()
        while True:
            if not self.checkpointer.has(self.step):
                self.save()
            self.watchdog.beat(f"saving step {self.step}")
            with self.meter.time("saving"):
                self.log_saved(self.checkpointer.wait())
            if not self.is_finite:
                return
            if self.checkpointer.saved_step == self.step or not self.checkpointer.can_retry:
                break
        self.watchdog.beat(f"step {self.step} saved")
        if self.checkpointer.saved_step != self.step:
            raise AgreedError(
                f"the checkpoint of step {self.step} could not be written (see above); "
                f"{self.checkpointer.describe_newest()}. Mend that and start again to continue from there"
            )

    def log_saved(self, saved: Saved | None) -> None:
        if saved is not None:
            self.run_logger.log_checkpoint(saved.step, saved.path, saved.seconds)
