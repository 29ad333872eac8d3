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


class NotFiniteError(AgreedError):
    """The weights have become useless."""


@dataclass(frozen=True)
class EvaluationResult:
    """What came out, over all ranks.

    confusion: (K, K) counts, row the true class, column the predicted one. top5_videos: those whose class is
    among the five most likely (all classes, where there are fewer). bad: videos that could not be read; they
    count nowhere else. loss_units: sum of the losses in `LOSS_UNIT`. bins: (3, BINS), see `reliability`.
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
        """Share of videos whose most likely class is right; NaN where there was no video."""
        return int(self.confusion.trace()) / self.videos if self.videos else math.nan

    @property
    def top5(self) -> float:
        return self.top5_videos / self.videos if self.videos else math.nan

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the videos' scores, see `outcomes_of`; NaN where there was no video."""
        return self.loss_units * LOSS_UNIT / self.videos if self.videos else math.nan

    @property
    def ece(self) -> float:
        """Expected calibration error, see `calibration_error`; NaN where there was no video."""
        return calibration_error(self.bins)


class OutcomeCounts:
    """Adds up outcomes on the device. All are whole numbers, so the sums do not depend on any order.

    Nothing here waits for the device but `evaluation`.
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self._classes = classes
        self._confusion = torch.zeros(classes * classes, dtype=torch.int64, device=device)
        self._bins = torch.zeros(3, BINS, dtype=torch.int64, device=device)
        # In the top five; bad; with scores that are not finite, whose order would mean nothing; the losses.
        self._sums = torch.zeros(4, dtype=torch.int64, device=device)

    def add(self, outcomes: Outcomes, labels: Tensor, valid: Tensor, there: Tensor) -> None:
        """Add B videos.

        labels: (B,) int64. valid: (B,) bool, those that could be read. there: (B,) bool, those that are
        videos at all, and not in a place that was left over.
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
                (there & ~valid).sum(),
                (valid & ~outcomes.finite).sum(),
                (outcomes.losses * ones).sum(),
            ]
        )

    def all_reduce(self) -> None:
        """Add up what all ranks have. Collective."""
        for counts in (self._confusion, self._bins, self._sums):
            dist.all_reduce(counts)

    def result(self) -> EvaluationResult:
        """What was counted. Waits for the device. Raises NotFiniteError where a video's scores are not."""
        top5, bad, not_finite, loss = self._sums.tolist()
        confusion = self._confusion.view(self._classes, self._classes).cpu()
        if not_finite:
            raise NotFiniteError(
                f"the model's outputs are not finite for {not_finite} of {int(confusion.sum()) + not_finite} "
                "validation videos: its weights have become useless. Lower optimisation.learning_rate or set "
                "optimisation.clip_norm, and go on from an earlier checkpoint with --resume"
            )
        return EvaluationResult(confusion, top5, bad, loss, self._bins.cpu())


def view_scores(forward: Callable[[Tensor], Tensor], batch: ClipBatch) -> Tensor:
    """(B, K): for each video the mean of its views' softmax. forward: (B V, 3, T, H, W) → logits (B V, K)."""
    videos, views = batch.clips.shape[:2]
    logits = forward(batch.clips.flatten(0, 1))
    return logits.softmax(dim=-1).unflatten(0, (videos, views)).mean(dim=1)


def evaluate(
    engine: Engine,
    loader: ClipLoader,
    num_classes: int,
    *,
    progress: Callable[[int], None],
    stop_requested: Callable[[], bool],
    on_batch: Callable[[ClipBatch, Tensor], None] | None = None,
) -> EvaluationResult | None:
    """See every video of the loader once: softmax of each view, their mean, classes by likelihood.

    progress: told the number of batches that are done. leaving: whether this rank was asked to leave; when
    any was, all give up and get None, and the loader is of no more use. keep: is given each batch and its
    scores, (B, K). Collective; all get the same.

    Raises NotFiniteError where the model's outputs are not finite for some video.
    """
    engine.eval()
    counts = OutcomeCounts(num_classes, engine.device)
    with torch.no_grad():
        for done, batch in enumerate(loader, start=1):
            scores = view_scores(engine.forward, batch)
            counts.add(outcomes_of(scores, batch.labels), batch.labels, batch.valid, batch.ids >= 0)
            if on_batch is not None:
                on_batch(batch, scores)
            progress(done)
            asked = torch.tensor(float(stop_requested()), device=engine.device)
            dist.all_reduce(asked)
            if asked:
                return None
    counts.all_reduce()
    engine.train()
    return counts.result()
