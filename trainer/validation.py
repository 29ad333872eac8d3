"""Evaluates the weights of a run on its validation videos."""

from dataclasses import dataclass, field

from pipelines.loader import ClipLoader
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import AgreedError
from trainer.evaluation.final_scores import FinalScoreWriter
from trainer.evaluation.multi_view import EvaluationResult, evaluate
from trainer.monitoring.throughput import ThroughputMeter
from trainer.resilience.signals import StopRequest
from trainer.resilience.watchdog import Watchdog
from trainer.run_logger import RunLogger
from trainer.setup.bad_video_limit import BadVideos, exceeds_limit


@dataclass
class Validator:
    """Runs the multi-view evaluation of a training on all ranks. Every method is collective."""

    engine: Engine
    loader: ClipLoader
    classes: int
    at_once: int
    """Most views per forward pass."""
    final_scores: FinalScoreWriter
    run_logger: RunLogger
    meter: ThroughputMeter
    stop: StopRequest
    watchdog: Watchdog
    bad_share: float
    """Share of bad validation videos above which the run stops, see `data.bad_share`."""
    result: EvaluationResult | None = None
    """Of the latest evaluation."""
    bad_videos: BadVideos = field(default_factory=BadVideos)

    def evaluate(self, step: int, *, writes_scores: bool) -> EvaluationResult | None:
        """Evaluate the EMA weights, or the weights where there is no EMA, on all validation videos.

        step: optimiser steps done. writes_scores: whether to write the scores of each video. Returns None
        where a rank was asked to stop meanwhile. Raises NotFiniteError where the outputs are not finite.
        """
        with self.meter.time("evaluating"), self.engine.ema_weights():
            log_progress = self.run_logger.log_evaluation_progress(self.loader.batches)

            def progress(done: int) -> None:
                log_progress(done)
                self.watchdog.beat(f"evaluation batch {done}")

            if writes_scores:
                self.final_scores.begin(step)
            result = None
            try:
                result = evaluate(
                    self.engine,
                    self.loader,
                    self.classes,
                    at_once=self.at_once,
                    progress=progress,
                    stop_requested=lambda: self.stop.poll() is not None,
                    on_batch=self.final_scores.add if writes_scores else None,
                )
            finally:
                if writes_scores:
                    self.final_scores.close(whole=result is not None)
        self.bad_videos.add(self.run_logger.quarantine_bad_samples(self.loader.bad_samples))
        if result is not None:
            self.result = result
            self.run_logger.log_evaluation(step, result)
        return result

    def check_bad_videos(self, result: EvaluationResult) -> None:
        """Raises AgreedError where so many videos are bad that the result means nothing."""
        videos = result.videos + result.bad
        if exceeds_limit(result.bad, self.bad_share, videos):
            raise AgreedError(
                f"{result.bad} of {videos} validation videos could not be read, more than data.bad_share "
                f"({self.bad_share:g}) allows; {self.bad_videos.first_reasons}. All are in "
                f"{self.run_logger.folder.quarantine}"
            )
