"""`Trainer.fit`: the training loop, and nothing of how its parts work."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipelines.loader import ClipBatch, ClipLoader
from pipelines.sampling.sampler import TrainSampler
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.metadata import TrainState
from trainer.checkpoint.retention import step_of
from trainer.distributed.batch_hash import hash_clips
from trainer.distributed.step_sync import StepSums, StepSync, StepTotals
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import AgreedError, RunError
from trainer.evaluation.final_scores import FinalScoreWriter
from trainer.evaluation.multi_view import EvaluationResult, NotFiniteError, evaluate
from trainer.lr_schedule import Schedule
from trainer.monitoring.data_bottleneck import DataBottleneckMonitor
from trainer.monitoring.throughput import ThroughputMeter
from trainer.resilience.nonfinite import NonfiniteDiagnosis
from trainer.resilience.signals import StopRequest, process_age
from trainer.resilience.skipped_steps import SkippedSteps
from trainer.resilience.watchdog import Watchdog
from trainer.run_logger import RunLogger
from trainer.setup.bad_video_limit import BadVideos, too_many


@dataclass
class Trainer:
    """One run: what `fit` works with.

    settings: what may not change when a checkpoint is gone on from. description: what is needed to use the
    weights, see `TrainState`. bad_share: share of the clips seen, or of the training set while less than
    that was seen, above which the run stops, where it is more than a few videos. keeps_best: whether to
    save after the best evaluation so far. final_scores: what writes those of the evaluation after the last
    step. step: optimiser steps done. clips, bad: seen so far, over all
    ranks; of them, clips_before and bad_before in earlier starts: what has been mended since must not stop
    the run again. saved_step: of the newest checkpoint that is visible. best: the highest accuracy so far.
    evaluates_only: the training has ended before, and nothing of it changes.
    final: the last evaluation, once there was one. is_finite: whether the last step was; where it was not,
    nothing is saved until one is. bad_videos, bad_val_videos: found since this start.
    """

    engine: Engine
    sampler: TrainSampler
    schedule: Schedule
    train_loader: ClipLoader
    val_loader: ClipLoader
    classes: int
    checkpoints: Checkpointer
    run_logger: RunLogger
    meter: ThroughputMeter
    stop: StopRequest
    watchdog: Watchdog
    diagnosis: NonfiniteDiagnosis
    skipped: SkippedSteps
    settings: dict[str, Any]
    description: dict[str, Any]
    tally: StepSync
    data_monitor: DataBottleneckMonitor
    bad_share: float
    evaluates_at_end: bool
    keeps_best: bool
    final_scores: FinalScoreWriter
    evaluates_only: bool = False
    step: int = 0
    clips: int = 0
    bad: int = 0
    clips_before: int = 0
    bad_before: int = 0
    saved_step: int = -1
    best: float | None = None
    final: EvaluationResult | None = None
    is_finite: bool = True
    bad_videos: BadVideos = field(default_factory=BadVideos)
    bad_val_videos: BadVideos = field(default_factory=BadVideos)

    def fit(self) -> bool:
        """Train to the last step. Returns False when the run was asked to leave before.

        Raises RunError where the weights have become useless: too many steps were not finite, or the last
        one, or what the model makes of the validation videos.
        """
        if self.evaluates_only:
            return not self.evaluates_at_end or self.evaluate()
        batches = iter(self.train_loader)
        self.engine.train()
        self.meter.record_startup(process_age())
        while self.step < self.schedule.total_steps:
            with self.meter.step(self.sampler.global_batch):
                totals = self.exchange(self.train_step(batches))
            self.step += 1
            self.watchdog.beat(f"step {self.step}")
            if totals is not None:
                self.take_note(totals)
            if totals is not None and totals.leaving:
                break
            if self.schedule.saves_after(self.step) or (totals is not None and totals.wants_save):
                self.save()
            if self.schedule.evaluates_after(self.step) and not self.evaluate():
                break
        self.finish_saving()
        if self.step < self.schedule.total_steps:
            return False
        if not self.is_finite:
            raise AgreedError(
                f"the last step, {self.step}, changed nothing, because its numbers were not finite: whether "
                f"the weights are good is not known, and they are not saved; {self.last_saved()}. "
                "uniformerv2 export writes a checkpoint's weights; lower optimisation.learning_rate to train "
                "on"
            )
        return not self.evaluates_at_end or self.evaluate()

    def train_step(self, batches: Iterator[ClipBatch]) -> StepSums:
        """One optimiser step over all micro-batches; returns this rank's sums."""
        loss_sum = torch.zeros((), device=self.engine.device)
        batch_hash = torch.zeros((), dtype=torch.int64, device=self.engine.device)
        rate = self.schedule.learning_rate(self.step)
        for number in range(self.engine.accumulation):
            with self.meter.waiting():
                batch = next(batches)
            batch_hash += hash_clips(batch)
            losses = clip_losses(self.engine.forward(batch.clips, batch.keys), batch)
            # A bad clip adds nothing and the denominator stays the whole batch, so that no rank needs to know
            # how many clips of the others are bad.
            loss = propagate_nonfinite(losses.sum())
            self.diagnosis.hold(self.step, number, batch, loss)
            self.engine.backward(loss / self.engine.micro_batch)
            if number == self.engine.accumulation - 1:
                self.conclude()  # the weights are still those that the step before met
            self.engine.step(rate)
            loss_sum += losses.detach().sum()
        self.run_logger.log_launch(self.step, rate, self.engine.gradient_norm())
        return StepSums(loss_sum, batch_hash)

    def conclude(self) -> None:
        """Look into the step before, if it changed nothing. Waits for that step only, not for later work."""
        outcome = self.engine.finish_step()
        if outcome is None:
            return
        self.is_finite = outcome
        if outcome:
            self.checkpoints.confirm(self.step - 1)  # the weights that it met
        else:
            self.leave_out(self.step - 1)

    def leave_out(self, step: int) -> None:
        """Say why this step changed nothing, and keep what shows it.

        Raises RunError when it is one too many.
        """
        # Weights that were saved but never gave a finite gradient may be the cause.
        self.checkpoints.doubt(f"the gradient of step {step + 1}, which met its weights, is not finite")
        finding = self.diagnosis.diagnose(step)
        try:
            words = self.skipped.add(step + 1, finding.reason)
        except RunError as error:
            self.run_logger.log_skipped_step(step, str(error), finding.file)
            raise AgreedError(f"{error}. {self.last_saved().capitalize()}") from error
        self.run_logger.log_skipped_step(step, words, finding.file)

    def exchange(self, sums: StepSums) -> StepTotals | None:
        """Tell the other ranks of this step, and hear what all say of the one before."""
        clips, bad = self.train_loader.bad_samples.pop_counts()
        return self.tally.exchange(
            self.step,
            sums,
            clips=clips,
            bad=bad,
            bad_samples=len(self.train_loader.bad_samples.new),
            leaving=self.stop.requested is not None,
            wants_save=self.checkpoints.is_due(),
            saves=self.checkpoints.counts(),
        )

    def take_note(self, totals: StepTotals) -> None:
        """Record a finished step. Raises RunError for too many bad clips."""
        self.saved(self.checkpoints.hear(totals.saves_finished, totals.saves_failed))
        self.clips += totals.clips
        self.bad += totals.bad
        if totals.bad_samples:
            self.bad_videos.add(self.run_logger.quarantine_bad_samples(self.train_loader.bad_samples))
        self.run_logger.log_step(totals, self.meter, self.sampler.epoch_of(totals.step + 1))
        self.run_logger.log_data_cost(totals.step, self.data_monitor.report_if_due(self.meter.spent))
        clips, bad = self.clips - self.clips_before, self.bad - self.bad_before
        if self.bad_videos.too_many(bad, clips, self.bad_share, self.sampler.samples):
            self.finish_saving()
            raise AgreedError(
                f"{bad} of {clips} clips could not be read, more than data.bad_share ({self.bad_share:g}) "
                f"allows; {self.bad_videos.first_reasons}. All are in {self.run_logger.quarantine_file}. "
                "Mend them or raise data.bad_share, and start again to continue; or make the manifest anew "
                "with --deep, which leaves bad videos out, and train with another --run-dir"
            )

    def settle(self) -> None:
        """Take note of the step handed in last, whose outcome and totals have not been read yet."""
        self.conclude()
        last = self.tally.last()
        if last is not None:
            self.take_note(last)

    def evaluate(self) -> bool:
        """See all validation videos. Returns False when a rank was asked to leave meanwhile.

        Raises RunError when too many of them are bad for the result to mean anything.
        """
        self.settle()
        with self.meter.evaluating(), self.engine.ema_weights():
            told = self.run_logger.log_evaluation_progress(self.val_loader.batches)

            def progress(done: int) -> None:
                told(done)
                self.watchdog.beat(f"evaluation batch {done}")

            ends = self.step == self.schedule.total_steps and not self.evaluates_only
            if ends:
                self.final_scores.begin(self.step)
            result = None
            try:
                result = evaluate(
                    self.engine,
                    self.val_loader,
                    self.classes,
                    progress=progress,
                    stop_requested=lambda: self.stop.requested is not None,
                    on_batch=self.final_scores.add if ends else None,
                )
            except NotFiniteError:
                self.checkpoints.doubt(f"the outputs of the evaluation after step {self.step} are not finite")
                raise
            finally:
                if ends:
                    self.final_scores.close(whole=result is not None)
        self.bad_val_videos.add(self.run_logger.quarantine_bad_samples(self.val_loader.bad_samples))
        if result is None:
            return False
        self.final = result
        self.run_logger.log_evaluation(self.step, result)
        if not self.evaluates_only:
            if self.is_finite and self.step == self.schedule.total_steps and result.videos:
                self.checkpoints.confirm(self.step)  # no step will do so
            self.keep_best(result.top1)
        videos = result.videos + result.bad
        if too_many(result.bad, self.bad_share, videos):
            raise AgreedError(
                f"{result.bad} of {videos} validation videos could not be read, more than data.bad_share "
                f"({self.bad_share:g}) allows; {self.bad_val_videos.first_reasons}. All are in "
                f"{self.run_logger.quarantine_file}"
            )
        return True

    def keep_best(self, top1: float) -> None:
        """Save weights that are more accurate than any before, unless they are saved already."""
        if math.isnan(top1):  # no validation video could be read
            return
        self.checkpoints.record_accuracy(self.step, top1)
        if self.best is None or top1 > self.best:
            self.best = top1
            if self.keeps_best and self.step not in (self.saved_step, self.checkpoints.in_flight):
                self.save()

    def save(self) -> None:
        """Begin to save a checkpoint; training goes on meanwhile. After a step that was not finite, it is the
        next finite one's.
        """
        self.settle()
        if not self.is_finite:
            self.checkpoints.postpone()
            return
        with self.meter.saving():
            self.saved(self.checkpoints.settle())
            self.checkpoints.begin(
                self.engine,
                TrainState(
                    step=self.step,
                    updates=self.engine.updates,
                    world_size=dist.get_world_size(),
                    zero_stage=self.engine.zero_stage,
                    settings=self.settings,
                    clips=self.clips,
                    bad=self.bad,
                    spent=self.meter.totals(),
                    saved_at=time.time(),
                    description=self.description,
                ),
            )

    def saved(self, path: Path | None) -> None:
        """Take note of a checkpoint that has become visible."""
        if path is not None:
            self.saved_step = step_of(path)
            self.run_logger.log_checkpoint(self.saved_step, path, self.checkpoints.took)

    def finish_saving(self) -> None:
        """Have this very step saved before going on, unless it was not finite.

        Raises RunError where that cannot be.
        """
        self.settle()
        trying = True
        while trying:
            if self.step not in (self.saved_step, self.checkpoints.in_flight):
                self.save()
            self.settle()
            self.watchdog.beat(f"saving step {self.step}")
            with self.meter.saving():
                self.saved(self.checkpoints.settle())
            if not self.is_finite:
                return
            trying = self.saved_step != self.step and self.checkpoints.freed_space
        self.watchdog.beat(f"step {self.step} saved")
        if self.saved_step != self.step:
            raise AgreedError(
                f"the checkpoint of step {self.step} could not be written (see above); {self.last_saved()}. "
                "Mend that and start again to continue from there"
            )

    def last_saved(self) -> str:
        """What a start would go on from, in words."""
        step = self.checkpoints.newest_step()
        return "there is no checkpoint" if step is None else f"the last checkpoint is of step {step}"

    def dry_run_batch(self, clips: Tensor) -> None:
        """A dry-run batch through forward, backward and optimiser, which leaves no trace.

        clips: (B, 3, T, H, W) of one micro-batch. A wrong size or too little memory shows now, not after the
        data has been read. Raises RunError when the model's loss is not finite, or memory runs out.
        """
        self.engine.train()
        # Keys as a step has them: without, a compiled model would be compiled once more at the first step.
        keys = torch.arange(len(clips), device=clips.device)
        labels = keys % self.classes
        try:
            with self.engine.preserved_state():
                for _ in range(self.engine.accumulation):
                    loss = F.cross_entropy(self.engine.forward(clips, keys), labels)
                    if not torch.isfinite(loss):
                        raise RunError(f"the loss of random clips is {float(loss)} before the first step")
                    self.engine.backward(loss * 0.0)
                    self.engine.step(0.0)
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"out of memory with {len(clips)} clips per rank: {str(error).splitlines()[0]} Lower "
                "engine.micro_batch, or raise engine.recomputed_blocks or engine.zero_stage"
            ) from error


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """The same, but that a loss which is not finite makes the whole gradient so: all ranks see it there."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def clip_losses(logits: Tensor, batch: ClipBatch) -> Tensor:  # B K -> B
    """Cross-entropy of each clip, zero for clips that could not be read."""
    losses = F.cross_entropy(logits, batch.labels.clamp(min=0), reduction="none")
    return losses * batch.valid
