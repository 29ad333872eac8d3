"""Metrics of a model as pure functions of counts, each with its formula."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 5
"""A video is correct in the top 5 if fewer classes than this rank above its own."""

BINS = 15
"""Confidence bins of equal width, as in Guo et al. 2017 (arXiv:1706.04599)."""

LOSS_UNIT = 2.0**-24
"""Losses are summed as integer multiples of this unit, so that the sum does not depend on the order or the
number of ranks. An int64 holds 6 * 10^9 times the largest loss, 87.4."""

CONFIDENCE_UNIT = 2.0**-32
"""The same for confidences; an int64 holds 2 * 10^9 of them."""

SMALLEST_SCORE = torch.finfo(torch.float32).tiny
"""Lower bound of a score in the loss, so that its logarithm is finite."""

MOST_CONFUSED = 20
"""Number of class pairs in a report."""


@dataclass(frozen=True)
class Outcomes:
    """Per-video outcomes of B videos.

    predictions: (B,) int64, the class with the highest score; the lowest index among equal scores.
    in_top5: (B,) bool, whether fewer than five classes rank above the true one. A class with an equal score
        and a lower index ranks above.
    losses: (B,) int64 in units of `LOSS_UNIT`.
    confidences: (B,) int64 in units of `CONFIDENCE_UNIT`.
    finite: (B,) bool, whether all scores of the video are finite; if not, its other outcomes are meaningless.
    """

    predictions: Tensor
    in_top5: Tensor
    losses: Tensor
    confidences: Tensor
    finite: Tensor


def outcomes_of(scores: Tensor, labels: Tensor) -> Outcomes:
    """Compare scores with labels.

    The loss is the cross-entropy of the averaged scores, -ln(s_y) for label y. The mean of the views' losses
    would be higher.

    Args:
        scores: (B, K) float32, each row a distribution over the classes: the mean softmax of a video's views.
        labels: (B,) int64, 0..K-1; -1 for a video without a label, whose outcome is meaningless.
    """
    finite = scores.isfinite().all(dim=1)
    scores = torch.where(finite[:, None], scores, 1.0)
    labels = labels.clamp(min=0)[:, None]
    own = scores.gather(1, labels)  # B 1
    classes = torch.arange(scores.shape[1], device=scores.device)
    ranks_above = (scores > own) | ((scores == own) & (classes < labels))
    # argmax returns the first of equal scores
    best, predictions = scores.max(dim=1).values, scores.argmax(dim=1)
    losses = -own[:, 0].double().clamp(min=SMALLEST_SCORE).log()
    return Outcomes(
        predictions,
        ranks_above.sum(dim=1) < TOP,
        (losses / LOSS_UNIT).round().long(),
        (best.double() / CONFIDENCE_UNIT).round().long(),
        finite,
    )


@dataclass(frozen=True)
class CalibrationBin:
    """Videos whose confidence, the score of the predicted class, is between lower and upper.

    lower, upper: limits of the bin.
    videos: number of videos.
    confidence: their mean confidence; NaN without videos.
    accuracy: share of correct predictions; NaN without videos.
    """

    lower: float
    upper: float
    videos: int
    confidence: float
    accuracy: float


def reliability(bins: Tensor) -> list[CalibrationBin]:
    """The reliability table.

    bins: (3, BINS) int64: number of videos, sum of confidences in `CONFIDENCE_UNIT`, correct predictions.
    """
    count = bins.shape[1]
    return [
        CalibrationBin(
            number / count,
            (number + 1) / count,
            videos,
            confidence * CONFIDENCE_UNIT / videos if videos else math.nan,
            right / videos if videos else math.nan,
        )
        for number, (videos, confidence, right) in enumerate(bins.t().tolist())
    ]


def calibration_error(bins: Tensor) -> float:
    """Expected calibration error: sum over bins b of n_b / n * |accuracy_b - confidence_b|.

    NaN without videos. bins: as for `reliability`.
    """
    table = [part for part in reliability(bins) if part.videos]
    videos = sum(part.videos for part in table)
    if not videos:
        return math.nan
    return math.fsum(part.videos * abs(part.accuracy - part.confidence) for part in table) / videos


def bin_of(confidences: Tensor) -> Tensor:
    """The bin index, 0..BINS-1, of each confidence, int64 in `CONFIDENCE_UNIT`."""
    # Integer arithmetic. No inner bin edge k / 15 is a multiple of the unit, so no confidence is on an edge.
    return (confidences * BINS // round(1 / CONFIDENCE_UNIT)).clamp(0, BINS - 1)


@dataclass(frozen=True)
class ClassAccuracy:
    """Counts of one class.

    label: index of the class.
    videos: videos of the class.
    correct: videos of the class with the right prediction.
    predicted: videos of any class predicted as this one.
    """

    label: int
    videos: int
    correct: int
    predicted: int

    @property
    def accuracy(self) -> float:
        """correct / videos; NaN without a video."""
        return self.correct / self.videos if self.videos else math.nan


def per_class(confusion: Tensor) -> list[ClassAccuracy]:
    """Counts of each class. confusion: (K, K), row the true class, column the predicted one."""
    columns = torch.stack([confusion.sum(dim=1), confusion.diagonal(), confusion.sum(dim=0)], dim=1)
    return [ClassAccuracy(label, *numbers) for label, numbers in enumerate(columns.tolist())]


def mean_class_accuracy(classes: Sequence[ClassAccuracy]) -> float:
    """Mean accuracy of the classes with videos; NaN if there are none."""
    known = [one.accuracy for one in classes if one.videos]
    return math.fsum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class ConfusedPair:
    """Videos of one class that were predicted as another.

    true, predicted: the two classes.
    videos: number of videos.
    share: fraction of the true class's videos.
    """

    true: int
    predicted: int
    videos: int
    share: float


def most_confused(confusion: Tensor, most: int = MOST_CONFUSED) -> list[ConfusedPair]:
    """The `most` pairs of different classes with the most videos; ties in the order of labels.

    confusion: (K, K) counts, row the true class, column the predicted one.
    """
    classes = len(confusion)
    wrong = confusion.clone().fill_diagonal_(0).flatten()
    order = wrong.argsort(descending=True, stable=True)[:most].tolist()
    of_class = confusion.sum(dim=1).tolist()
    pairs = []
    for place in order:
        videos, true = int(wrong[place]), place // classes
        if videos:
            pairs.append(ConfusedPair(true, place % classes, videos, videos / of_class[true]))
    return pairs
