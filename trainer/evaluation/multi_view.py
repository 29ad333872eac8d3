"""Multi-view evaluation over all ranks, with exact counts."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines.loader import ClipBatch, ClipLoader
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import AgreedError
from trainer.evaluation.metrics import BINS, LOSS_UNIT, Outcomes, bin_of, calibration_error, outcomes_of
from trainer.inference.view_scores import view_scores


class NotFiniteError(AgreedError):
    """The model's outputs are NaN or infinite."""


@dataclass(frozen=True)
class EvaluationResult:
    """Counts of an evaluation over all ranks.

    confusion: (K, K) counts, row the true class, column the predicted one.
    top5_videos: number of videos that are correct in the top 5.
    bad: number of unreadable videos; no other count includes them.
    loss_units: sum of the losses in `LOSS_UNIT`.
    bins: (3, BINS), see `reliability`.
    """

    confusion: Tensor
    top5_videos: int
    bad: int
    loss_units: int
    bins: Tensor

    @property
    def videos(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        """Share of videos with the right prediction; NaN without videos."""
        return int(self.confusion.trace()) / self.videos if self.videos else math.nan

    @property
    def top5(self) -> float:
        return self.top5_videos / self.videos if self.videos else math.nan

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the videos' scores, see `outcomes_of`; NaN without videos."""
        return self.loss_units * LOSS_UNIT / self.videos if self.videos else math.nan

    @property
    def ece(self) -> float:
        """Expected calibration error, see `calibration_error`; NaN without videos."""
        return calibration_error(self.bins)


class OutcomeCounts:
    """Sums outcomes on the device. All are integers, so the sums do not depend on the order.

    Only `result` waits for the device.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes = classes
        self._confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, BINS, dtype=torch.int64, device=device)
        # Correct in the top 5, bad, nonfinite scores, losses.
        self._sums = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, outcomes: Outcomes, labels: Tensor, valid: Tensor, is_video: Tensor) -> None:
        """Add B videos.

        labels: (B,) int64.
        valid: (B,) bool, False for unreadable videos and padding.
        is_video: (B,) bool, False for padding of the last batch.
        """
        counted = valid & outcomes.finite
        ones = counted.long()
        labels = labels.clamp(min=0)
        right = outcomes.predictions == labels
        place = labels * self._classes + outcomes.predictions
        self._confusion.index_put_((place,), ones, accumulate=True)
        of_bins = torch.stack([ones, outcomes.confidences * ones, ones * right])
        self._bins.index_add_(1, bin_of(outcomes.confidences), of_bins)
        self._sums += torch.stack(
            [
                (outcomes.in_top5 & counted).sum(),
                (is_video & ~valid).sum(),
                (valid & ~outcomes.finite).sum(),
                (outcomes.losses * ones).sum(),
            ]
        )

    def all_reduce(self) -> None:
        """Sum the counts of all ranks. Collective."""
        for counts in (self._confusion, self._bins, self._sums):
            dist.all_reduce(counts)

    def result(self) -> EvaluationResult:
        """The counts. Waits for the device. Raises NotFiniteError if a video's scores are not finite."""
        top5, bad, not_finite, loss = self._sums.tolist()
        confusion = self._confusion.view(self._classes, self._classes).cpu()
        if not_finite:
            raise NotFiniteError(
                f"the model's outputs are not finite for {not_finite} of {int(confusion.sum()) + not_finite} "
                "validation videos: its weights are damaged. Lower optimisation.learning_rate or set "
                "optimisation.clip_norm, and resume from an earlier checkpoint with --resume"
            )
        return EvaluationResult(confusion, top5, bad, loss, self._bins.cpu())


def evaluate(
    engine: Engine,
    loader: ClipLoader,
    num_classes: int,
    *,
    at_once: int,
    progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
    on_batch: Callable[[ClipBatch, Tensor], None] | None = None,
) -> EvaluationResult | None:
    """Evaluate every video of the loader once; the scores of a video are the mean softmax of its views.

    Collective; all ranks get the same result. None if any rank was requested to stop: the loader must then be
    closed.

    Args:
        num_classes: K, outputs of the model.
        at_once: most views per forward pass.
        progress: called with the number of evaluated batches.
        stop_requested: whether this rank was requested to stop.
        on_batch: called with each batch and its scores, (B, K).

    Raises:
        NotFiniteError: the model's outputs are not finite for some video.
        RunError: the device's memory runs out.
    """
    engine.eval()
    counts = OutcomeCounts(num_classes, engine.device)
    with torch.no_grad():
        for done, batch in enumerate(loader, start=1):
            scores = view_scores(
                engine.forward,
                batch.clips,
                at_once,
                reduce_by="Lower evaluation.batch, evaluation.clips or evaluation.crops",
            )
            counts.add(outcomes_of(scores, batch.labels), batch.labels, batch.valid, batch.ids >= 0)
            if on_batch is not None:
                on_batch(batch, scores)
            progress(done)
            stopping = torch.tensor(float(stop_requested()), device=engine.device)
            dist.all_reduce(stopping)
            if stopping:
                return None
    counts.all_reduce()
    engine.train()
    return counts.result()
